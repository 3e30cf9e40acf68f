"""Many ONNX graphs of one model beside one file of weights: each tensor is written once, whichever graphs hold it."""

import hashlib
from pathlib import Path
from typing import Any

SMALLEST = 1024  # bytes of a tensor that leaves its graph
_ALIGNED = 64  # places in the file are multiples of it, so that a reader may map them


class SharedWeights:
    """A file that fills while graphs give up their tensors to it.

    >>> weights = SharedWeights(Path("site/model/weights.bin"))  # doctest: +SKIP
    >>> weights.take(graph); onnx.save(graph, "site/model/etps-50.onnx")  # doctest: +SKIP
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._places: dict[bytes, tuple[int, int]] = {}  # of each tensor by its sum: offset and length
        file.write_bytes(b"")

    def take(self, model: Any) -> None:
        """Move the tensors of an `onnx.ModelProto` into the file; the graph is left with where they lie there.

        What only the exporter's developers read, as stack traces and inferred shapes, is left out.
        """
        import onnx

        for tensor in model.graph.initializer:
            data = onnx.numpy_helper.to_array(tensor).tobytes()
            if len(data) >= SMALLEST:
                _point(tensor, self.file.name, *self._place(data))
        _strip(model)

    def _place(self, data: bytes) -> tuple[int, int]:
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            with self.file.open("ab") as out:
                out.write(b"\0" * (-out.tell() % _ALIGNED))
                self._places[key] = (out.tell(), len(data))
                out.write(data)
        return self._places[key]


def _point(tensor: Any, file: str, offset: int, length: int) -> None:
    """Leave of a tensor its name, type and shape, and where its bytes are."""
    import onnx

    dims, kind, name = list(tensor.dims), tensor.data_type, tensor.name
    tensor.Clear()
    tensor.dims.extend(dims)
    tensor.data_type, tensor.name = kind, name
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _strip(model: Any) -> None:
    model.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    model.graph.ClearField("metadata_props")
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
