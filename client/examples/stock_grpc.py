"""The service with plain gRPC: generated stubs, without the client.

The contract has all that the client adds: retries by a service config, errors as ``google.rpc.Status``, progress by a
server stream.
"""

import json
import sys
import uuid
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from sample import SOURCE_PROMPT, TARGET_PROMPT, flags, red_circle_png
from underpaint.v1 import edit_service_pb2 as pb
from underpaint.v1 import edit_service_pb2_grpc as stubs
from underpaint.v1 import inversion_service_pb2, types_pb2

RETRIES = {
    "methodConfig": [
        {
            "name": [{}],  # every RPC
            "waitForReady": True,
            "retryPolicy": {
                "maxAttempts": 5,  # gRPC makes no more
                "initialBackoff": "0.5s",
                "maxBackoff": "10s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
"""The service config. Without request ids, a repeat would do its work twice. A refusal says when to come back
(grpc-retry-pushback-ms), and gRPC waits as long."""


def explain(error: Any) -> str:
    """Status code, reason and wrong fields of an error, from the trailer with google.rpc.Status."""
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    lines = [f"{error.code().name}: {error.details()}"]
    for detail in status.details:
        info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            lines.append(f"reason {info.reason} {dict(info.metadata)}")
        elif detail.Unpack(bad_request):
            lines += [f"{violation.field}: {violation.description}" for violation in bad_request.field_violations]
    return "\n  ".join(lines)


def main() -> None:
    """Run one edit with progress, then one that the server refuses."""
    options = flags(__doc__, "stock_grpc.png").parse_args()
    edit = pb.EditRequest(
        request_id=str(uuid.uuid4()),
        image=types_pb2.Image(content=red_circle_png()),
        inversion_parameters=inversion_service_pb2.InversionParameters(source_prompt=SOURCE_PROMPT, steps=20),
        target_prompt=TARGET_PROMPT,
        edict=pb.EdictEdit(),
    )
    retries = ("grpc.service_config", json.dumps(RETRIES))
    with grpc.insecure_channel(options.target, options=[retries]) as channel:
        service = stubs.EditServiceStub(channel)
        for event in service.StreamEdit(pb.StreamEditRequest(edit=edit), timeout=120):
            if event.WhichOneof("event") == "progress":
                print(types_pb2.Phase.Name(event.progress.phase), f"{event.progress.fraction:.0%}")
            elif event.WhichOneof("event") == "result":
                Path(options.output).write_bytes(event.result.image.content)
                print("written", options.output, "from", event.result.inversion)
        try:
            service.Edit(pb.EditRequest(target_prompt=TARGET_PROMPT, sdedit=pb.SdEdit(strength=2)), timeout=120)
        except grpc.RpcError as error:
            print("refused as expected:", explain(error))
        else:
            sys.exit("a strength of 2 was accepted")


if __name__ == "__main__":
    main()
