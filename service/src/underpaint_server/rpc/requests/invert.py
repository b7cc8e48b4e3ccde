"""From an InvertRequest to a draft: defaults are filled in and limits checked before the image is decoded."""

from underpaint.v1 import inversion_service_pb2

from underpaint_server.jobs import ModelInfo
from underpaint_server.methods import INVERSIONS
from underpaint_server.methods.message import DEFAULT_STRENGTH
from underpaint_server.rpc.requests.inversion import inversion_options
from underpaint_server.settings import Settings
from underpaint_server.wire.drafts import InvertDraft
from underpaint_server.wire.reader import Reader


def invert_draft(request: inversion_service_pb2.InvertRequest, model: ModelInfo, settings: Settings) -> InvertDraft:
    """Read an InvertRequest. Raises FieldInvalid with all invalid fields."""
    reader = Reader(model, settings)
    name = request.parameters.WhichOneof("method")
    if name is None:
        reader.fields.report("parameters.method", f"not set; choose {' or '.join(INVERSIONS)}")
    if not request.HasField("image"):
        reader.fields.report("image", "not set")
    image = reader.image("image", request.image)
    method = INVERSIONS[name] if name is not None else next(iter(INVERSIONS.values()))
    options = inversion_options(reader, request.parameters, method, "parameters", DEFAULT_STRENGTH)
    priority = reader.priority(request.priority)
    reader.fields.check()
    return InvertDraft(model, image, options, request.verify, priority)
