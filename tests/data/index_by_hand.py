"""An index.json that another program could have written. Called by the tests beside it."""

import hashlib
import json
from pathlib import Path


def rewrite_index(folder: Path, change: dict[str, object]) -> None:
    """Changes fields of the first shard; the index's own checksum is right."""
    content = json.loads((folder / "index.json").read_text())
    content["shards"][0] |= change
    del content["checksum"]
    content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "index.json").write_text(json.dumps(content))
