"""One stage of each rival method for one image, written from its paper's formulas in plain loops, in float64.

A stage is given as `Given`: tokens, and what the block's attention has. What comes of it is `Taken`: the kept tokens by their old
places, the token that each removed one went into (by its old place; None where it is dropped), the tokens and their sizes.
Nothing is shared with the library.

Sources: PiToMe, Tran et al. 2024 (arXiv 2405.16148), algorithm 1 and eq. 4; ToFu, Kim et al. 2024 (2312.01026), section 3; MCTF,
Lee et al. 2024 (2403.10030), eq. 3 to 8; DiffRate, Chen et al. 2023 (2305.17997), section 3; ATC, Haurum et al. 2024 (2409.11923),
section 3; Zero-TPrune, Wang et al. 2024 (2305.17328), section 3; representation shift, Choi et al. 2025 (2508.00367), section 3.3;
VisionZip, Yang et al. 2025 (2412.04467), section 3; PruMerge, Shang et al. 2024 (2403.15388), section 3; SAINT, Jeddi et al. 2025
(2503.11549), section 3; the error of merging, Lee and Choi 2025 (2505.15160), theorem 1.
"""

import math
from dataclasses import dataclass, field

import numpy as np

Vector = np.ndarray


@dataclass
class Given:
    """One image at one stage. Prefix tokens come first and are never removed."""

    x: Vector  # [T, C]
    prefix: int
    count: int  # patch tokens to leave
    queries: Vector  # [H, T, d], scaled
    keys: Vector  # [H, T, d]
    size: Vector  # [T], patches that each token stands for
    block: int = 0
    depth: int = 1
    ahead_of_mlp: Vector | None = None  # [T, C], where the stage is behind the MLP
    proportional: bool = True  # attention has log(size) on its logits

    @property
    def patches(self) -> list[int]:
        return list(range(self.prefix, len(self.x)))

    def attention(self) -> Vector:
        """[H, T, T]."""
        out = np.zeros((len(self.keys), len(self.x), len(self.x)))
        for h in range(len(self.keys)):
            for i in range(len(self.x)):
                logits = [
                    float(self.queries[h, i] @ self.keys[h, j]) + (math.log(self.size[j]) if self.proportional else 0.0)
                    for j in range(len(self.x))
                ]
                top = max(logits)
                powers = [math.exp(value - top) for value in logits]
                out[h, i] = np.array(powers) / sum(powers)
        return out

    def class_attention(self) -> Vector:
        """[T]."""
        return self.attention()[:, 0].mean(axis=0)

    def key(self, i: int) -> Vector:
        """Mean over heads."""
        return sum(self.keys[h, i] for h in range(len(self.keys))) / len(self.keys)


@dataclass
class Taken:
    kept: list[int]  # places among all tokens
    into: dict[int, int | None]
    tokens: dict[int, Vector]  # of the kept ones, by place
    size: dict[int, float]
    extra: Vector | None = None  # a token that no patch has become
    scores: dict[int, float] = field(default_factory=dict)


def cosine(a: Vector, b: Vector) -> float:
    return float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))


def first_of(values: dict[int, float], count: int, largest: bool = True) -> list[int]:
    """The `count` places of the largest (or smallest) values; of equals the lower place."""
    sign = -1 if largest else 1
    return sorted(values, key=lambda i: (sign * values[i], i))[:count]


def best(values: dict[int, float]) -> int:
    return first_of(values, 1)[0]


def turns(g: Given) -> tuple[list[int], list[int]]:
    """Even and odd places."""
    return [i for i in g.patches if i % 2 == 0], [i for i in g.patches if i % 2 == 1]


def gather(g: Given, into: dict[int, int], weight: dict[int, float], size: dict[int, float]) -> Taken:
    """Every token that has `into` goes there, as part of a mean weighted by `weight`; sizes add."""
    kept = [i for i in g.patches if i not in into]
    tokens, sizes = {}, {}
    for j in kept:
        members = [j, *(i for i in into if into[i] == j)]
        total = sum(weight[i] for i in members)
        tokens[j] = sum(weight[i] * g.x[i] for i in members) / total
        sizes[j] = sum(size[i] for i in members)
    return Taken(kept, dict(into), tokens, sizes)


def by_size(g: Given, into: dict[int, int]) -> Taken:
    size = {i: float(g.size[i]) for i in g.patches}
    return gather(g, into, size, size)


def dropped(g: Given, gone: list[int]) -> Taken:
    kept = [i for i in g.patches if i not in gone]
    return Taken(kept, dict.fromkeys(gone), {i: g.x[i] for i in kept}, {i: float(g.size[i]) for i in kept})


def merge_error(g: Given) -> Taken:
    """Of each even token the odd one with the least n_i n_j / (n_i + n_j) (1 - cos); the pairs with least error are merged."""
    sources, targets = turns(g)
    error, target = {}, {}
    for i in sources:
        each = {}
        for j in targets:
            factor = g.size[i] * g.size[j] / (g.size[i] + g.size[j])
            each[j] = -factor * (1 - cosine(g.key(i), g.key(j)))
        target[i] = best(each)
        error[i] = each[target[i]]
    gone = first_of(error, len(g.patches) - g.count)
    return by_size(g, {i: target[i] for i in gone})


def tofu(g: Given) -> Taken:
    """ToMe's pairs. Up to the middle block the source is dropped; then merged, at the largest norm among the merged."""
    sources, targets = turns(g)
    likeness, target = {}, {}
    for i in sources:
        each = {j: cosine(g.key(i), g.key(j)) for j in targets}
        target[i] = best(each)
        likeness[i] = each[target[i]]
    gone = first_of(likeness, len(g.patches) - g.count)
    if g.block <= g.depth // 2:
        return dropped(g, gone)
    kept = [i for i in g.patches if i not in gone]
    tokens = {}
    for j in kept:
        members = [j, *(i for i in gone if target[i] == j)]
        mean = sum(g.x[i] for i in members) / len(members)
        norm = max(float(np.linalg.norm(g.x[i])) for i in members)
        tokens[j] = mean / np.linalg.norm(mean) * norm
    return Taken(kept, {i: target[i] for i in gone}, tokens, {})


def pitome(g: Given, margin: float, always: bool) -> Taken:
    """Energy: the mean over all tokens of ELU(cos - m), m = margin (1 - block / depth). Tokens in order of energy, high first,
    are sources and destinations by turns.

    The paper (always): only the first 2 r take part, and all r sources among them merge. The authors' code in the first half of
    the blocks: all tokens take part, and the r sources most like their destination merge.
    """
    r = len(g.patches) - g.count
    m = margin * (1 - g.block / g.depth)
    energy = {}
    for i in g.patches:
        total = 0.0
        for j in g.patches:
            over = cosine(g.key(i), g.key(j)) - m
            total += over if over > 0 else math.exp(over) - 1
        energy[i] = total / len(g.patches)
    order = first_of(energy, len(g.patches))
    bipartite = not always and g.block < math.ceil(g.depth / 2)
    part = order if bipartite else order[: 2 * r]
    likeness, target = {}, {}
    for i in part[::2]:
        each = {j: cosine(g.key(i), g.key(j)) for j in part[1::2]}
        target[i] = best(each)
        likeness[i] = each[target[i]]
    gone = first_of(likeness, r)
    return by_size(g, {i: target[i] for i in gone})


def mctf(g: Given, temperatures: tuple[float, float, float]) -> Taken:
    """W = similarity^(1/t1) informativeness^(1/t2) size^(1/t3), in both directions; pooled by attention and size."""
    attention = g.attention().mean(axis=(0, 1))  # what a token receives, over heads and queries
    t_similar, t_inform, t_size = temperatures

    def weight(i: int, j: int) -> float:
        similar = (cosine(g.x[i], g.x[j]) + 1) / 2
        inform = 1 / (attention[i] * attention[j])
        size = 1 / (g.size[i] * g.size[j])
        return similar ** (1 / t_similar) * inform ** (1 / t_inform) * size ** (1 / t_size)

    r = len(g.patches) - g.count
    a, b = turns(g)
    forth, to = {}, {}
    for i in a:
        each = {j: weight(i, j) for j in b}
        to[i] = best(each)
        forth[i] = each[to[i]]
    gone_a = first_of(forth, r // 2)
    left = [i for i in a if i not in gone_a]
    back, home = {}, {}
    for j in b:
        each = {i: weight(i, j) for i in left}
        home[j] = best(each)
        back[j] = each[home[j]]
    gone_b = first_of(back, r - r // 2)
    into = {i: to[i] for i in gone_a} | {j: home[j] for j in gone_b}
    into = {i: into.get(j, j) for i, j in into.items()}  # what went into a token that went on goes on with it
    size = {i: float(g.size[i]) for i in g.patches}
    return gather(g, into, {i: attention[i] * g.size[i] for i in g.patches}, size)


def diffrate(g: Given, merged: int) -> Taken:
    """Sorted by class attention: the last are pruned, the `merged` ahead of them go into the most similar of the first."""
    attention = g.class_attention()
    order = first_of({i: attention[i] for i in g.patches}, len(g.patches))
    kept, middle, gone = order[: g.count], order[g.count : g.count + merged], order[g.count + merged :]
    into: dict[int, int | None] = dict.fromkeys(gone)
    tokens, size = {}, {j: float(g.size[j]) for j in kept}
    for i in middle:
        each = {j: cosine(g.x[i], g.x[j]) for j in kept}
        into[i] = best(each)
        size[into[i]] += g.size[i] * max(each[into[i]], 0.0)
    for j in kept:
        members = [j, *(i for i in middle if into[i] == j)]
        tokens[j] = sum(g.x[i] for i in members) / len(members)
    return Taken(sorted(kept), into, tokens, size, scores={i: attention[i] for i in g.patches})


def atc(g: Given, linkage: str) -> Taken:
    """Clusters of keys, joined two by two, the nearest first, until `count` are left; 1 - cos apart; means by size."""
    clusters = [[i] for i in g.patches]
    apart = {(i, j): 1 - cosine(g.key(i), g.key(j)) for i in g.patches for j in g.patches}

    def distance(a: list[int], b: list[int]) -> float:
        every = [apart[i, j] for i in a for j in b]
        return {"average": sum(every) / len(every), "complete": max(every), "single": min(every)}[linkage]

    while len(clusters) > g.count:
        pairs = {(a, b): distance(clusters[a], clusters[b]) for a in range(len(clusters)) for b in range(a + 1, len(clusters))}
        a, b = min(pairs, key=lambda p: pairs[p])
        clusters[a] = sorted(clusters[a] + clusters[b])
        del clusters[b]
    into = {i: cluster[0] for cluster in clusters for i in cluster[1:]}
    return by_size(g, into)


def zero_tprune(g: Given, similar: int, votes: int) -> Taken:
    """I', S, I. A vote: s <- A^T s, in each head; heads by the root of the mean of squares; the class token begins with sqrt(T)
    times what others have. S: of the half that one vote ranks lower, the `similar` tokens most like one of the upper half go.
    I: after `votes` votes without those, the lowest go."""
    attention = g.attention()
    tokens = len(g.x)

    def importance(count: int, out: list[int]) -> dict[int, float]:
        squares = np.zeros(tokens)
        for matrix in attention:
            start = np.array([1.0] * tokens)
            if g.prefix:
                start[0] = math.sqrt(tokens)
            start /= start.sum()
            start[out] = 0
            for _ in range(count):
                after = np.zeros(tokens)
                for j in range(tokens):
                    for i in range(tokens):
                        after[i] += matrix[j, i] * start[j]
                after[out] = 0
                start = after
            squares += start**2
        return {i: math.sqrt(squares[i] / len(attention)) for i in g.patches}

    ranked = first_of(importance(1, []), len(g.patches))
    upper, lower = ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :]
    likeness = {i: max(cosine(g.key(i), g.key(j)) for j in upper) for i in lower}
    twins = first_of(likeness, similar)
    final = importance(votes, twins)
    left = {i: final[i] for i in g.patches if i not in twins}
    kept = first_of(left, g.count)
    return dropped(g, [i for i in g.patches if i not in kept])


def shift(g: Given) -> Vector:
    """|| MLP(LN(x')) - x' ||, where the block puts out MLP(LN(x')) + x'; of all tokens."""
    assert g.ahead_of_mlp is not None
    return np.array([np.linalg.norm((g.x[i] - g.ahead_of_mlp[i]) - g.ahead_of_mlp[i]) for i in range(len(g.x))])


def visionzip(g: Given, contextual: int) -> Taken:
    """Dominant tokens by class attention; of the others evenly spaced ones are targets, and the rest goes into the most similar."""
    attention = g.class_attention()
    dominant = first_of({i: attention[i] for i in g.patches}, g.count - contextual)
    others = [i for i in g.patches if i not in dominant]
    step = max(1, len(others) // contextual) if contextual else 1
    targets = others[::step][:contextual]
    into: dict[int, int | None] = {}
    for i in others:
        if i not in targets:
            into[i] = best({j: cosine(g.key(i), g.key(j)) for j in targets}) if targets else None
    tokens = {i: g.x[i] for i in dominant}
    for j in targets:
        members = [j, *(i for i in into if into[i] == j)]
        tokens[j] = sum(g.x[i] for i in members) / len(members)
    return Taken(sorted([*dominant, *targets]), into, tokens, {})


def prumerge(g: Given, neighbours: int) -> Taken:
    """Every token kept by class attention, plus the sum of its nearest others by keys, weighted by their attention; and one token,
    the weighted sum of those removed."""
    attention = g.class_attention()
    kept = sorted(first_of({i: attention[i] for i in g.patches}, g.count - 1))
    gone = [i for i in g.patches if i not in kept]
    tokens = {}
    for j in kept:
        near = first_of({i: cosine(g.key(i), g.key(j)) for i in g.patches if i != j}, neighbours)
        tokens[j] = g.x[j] + sum(attention[i] * g.x[i] for i in near)
    into = {i: best({j: cosine(g.key(i), g.key(j)) for j in kept}) for i in gone}
    return Taken(kept, into, tokens, {}, extra=sum(attention[i] * g.x[i] for i in gone))


def saint(g: Given, threshold: float, gamma: float) -> Taken:
    """Of the tokens at even patch places those go that have most neighbours above the threshold among the odd ones, the nearer
    the more: count * exp(gamma (mean - threshold)); one without neighbours counts by its mean similarity."""
    sources, targets = g.patches[::2], g.patches[1::2]
    score = {}
    for i in sources:
        every = [cosine(g.key(i), g.key(j)) for j in targets]
        near = [value for value in every if value >= threshold]
        if near:
            score[i] = len(near) * math.exp(gamma * (sum(near) / len(near) - threshold))
        else:
            score[i] = sum(every) / len(every)
    return dropped(g, first_of(score, len(g.patches) - g.count))
