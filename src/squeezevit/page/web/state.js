// What the page knows: the model it shows, the photograph, what is chosen, and what was found for it.

export const state = {
  manifest: null, engine: null, photo: null, shares: [1], share: 1, depth: 0,
  results: new Map(), // by file, of this photograph
  taken: new Map(), // milliseconds of each round, by file
  early: null, // the photograph that was chosen before there was a model, as `offer` takes it
  reading: 0, // photographs that the model's thread is still to read
  turn: 0, // of what is computed; an older turn stops when it sees a newer one
  playing: 0, soon: 0, // timers
  played: false, // once, when there is something to see
};

/** The graph of a method at the share that is chosen; none for the unreduced model. */
export const graphOf = (method) => state.manifest.graphs.find((graph) => graph.method === method.key && graph.share === state.share);

export const fileOf = (method) => graphOf(method)?.file ?? state.manifest.dense.file;

/** The unreduced model's file, then each method's. */
export const filesShown = () => [state.manifest.dense.file, ...state.manifest.methods.map(fileOf)];
