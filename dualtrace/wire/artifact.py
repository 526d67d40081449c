"""PutArtifact: large inputs in parts, both ways."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from dualtrace.artifacts import MAX_ARTIFACT_BYTES, PART_BYTES
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.questions.asked import ArtifactQuestion
from dualtrace.v1 import scoring_pb2 as pb
from dualtrace.wire.strict import refuse_unknown


async def artifact_from_pb(parts: AsyncIterator[pb.PutArtifactRequest]) -> ArtifactQuestion:
    """The parts put together. Refused as soon as they are too many, so that a sender cannot fill the memory."""
    digest = ""
    data = bytearray()
    first = True
    async for message in parts:
        refuse_unknown(message)
        if message.HasField("digest") != first:
            text = "the digest stands in the first message and in no other"
            raise InvalidArgument(Reason.CONFLICT if not first else Reason.MISSING, text, field="digest")
        if first:
            digest, first = message.digest, False
        if len(message.part) > PART_BYTES:
            text = f"a part of {len(message.part)} bytes was sent; at most {PART_BYTES}"
            raise InvalidArgument(Reason.TOO_MANY, text, field="part", allowed=f"0-{PART_BYTES}")
        if len(data) + len(message.part) > MAX_ARTIFACT_BYTES:
            text = f"the artifact is larger than {MAX_ARTIFACT_BYTES} bytes"
            raise InvalidArgument(Reason.MASK_TOO_LARGE, text, allowed=f"up to {MAX_ARTIFACT_BYTES} bytes")
        data += message.part
    if first:
        raise InvalidArgument(Reason.EMPTY, "no part was sent", field="digest")
    return ArtifactQuestion(bytes(data), digest)


def artifact_to_pb(question: ArtifactQuestion) -> Iterator[pb.PutArtifactRequest]:
    parts = [question.data[i : i + PART_BYTES] for i in range(0, len(question.data), PART_BYTES)] or [b""]
    for index, part in enumerate(parts):
        yield pb.PutArtifactRequest(digest=question.digest if index == 0 else None, part=part)
