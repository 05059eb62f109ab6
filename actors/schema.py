"""Arrow schemas of prompts and rollouts, and the check at each room's door.

Tables with a declared schema are the only thing that travels between processes and lands on disk.  A schema carries its
name and version in its metadata and never depends on configuration.
"""

import pyarrow as pa

_PROMPT_FIELDS = [
    pa.field("prompt_id", pa.string(), nullable=False),  # given, or a hash of the content
    pa.field("prompt", pa.string(), nullable=False),  # plain text, or chat messages as a JSON array
    pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
    pa.field("extras", pa.string(), nullable=False),  # one JSON object: the dataset's other columns
]

_ROLLOUT_FIELDS = [
    *_PROMPT_FIELDS,
    pa.field("run_id", pa.string(), nullable=False),
    pa.field("incarnation", pa.int32(), nullable=False),  # grows with each rollback, so versions are never confused
    pa.field("group_id", pa.string(), nullable=False),  # "<epoch>/<prompt_id>", see `group_id`
    pa.field("sample_index", pa.int32(), nullable=False),
    pa.field("lease_id", pa.int64(), nullable=False),
    pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
    pa.field("response_text", pa.string(), nullable=False),
    pa.field("logprobs", pa.list_(pa.float32()), nullable=False),  # of the full distribution at the run's temperature
    pa.field("policy_versions", pa.list_(pa.int32()), nullable=False),  # per token
    pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),  # false on environment tokens
    pa.field("finish_reason", pa.string(), nullable=False),  # one of FINISH_REASONS
]

FINISH_REASONS = ("eos", "stop", "length")
"""`eos`: the model ended by itself; `stop`: a stop string was completed; `length`: truncated at the limit."""


class SchemaError(ValueError):
    """A table at a room's door does not have the declared schema."""


def declare(name: str, version: int, fields: list[pa.Field]) -> pa.Schema:
    """Return a schema that carries its name and version in its metadata."""
    return pa.schema(fields, metadata={"concord.schema": name, "concord.version": str(version)})


PROMPTS = declare("prompts", 1, _PROMPT_FIELDS)
ROLLOUTS = declare("rollouts", 1, _ROLLOUT_FIELDS)


def group_id(epoch: int, prompt_id: str) -> str:
    """Return the identity of a group: one prompt in one epoch, e.g. `"0/q17"`."""
    return f"{epoch}/{prompt_id}"


def to_stream(table: pa.Table) -> bytes:
    """Return a table as an Arrow stream: for a row or two many times faster to send than the table itself."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    stream: bytes = sink.getvalue().to_pybytes()
    return stream


def from_stream(stream: bytes) -> pa.Table:
    """Return the table of an Arrow stream."""
    return pa.ipc.open_stream(stream).read_all()


def check(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """Return `table` if it has `schema` and no null in a required column.

    Raises:
        SchemaError: naming the place, the column and the difference.
    """
    name = schema.metadata[b"concord.schema"].decode()
    for field in schema:
        if field.name not in table.column_names:
            raise SchemaError(f"{where}: a {name} table must have column {field.name!r}, got {table.column_names}")
        found = table.schema.field(field.name)
        if found.type != field.type:
            raise SchemaError(f"{where}: column {field.name!r} of {name} must be {field.type}, got {found.type}")
        if not field.nullable and table[field.name].null_count:
            raise SchemaError(f"{where}: column {field.name!r} of {name} must have no nulls")
    extra = set(table.column_names) - set(schema.names)
    if extra:
        raise SchemaError(f"{where}: a {name} table must not have columns {sorted(extra)}")
    return table
