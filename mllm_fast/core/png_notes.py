"""Notes in a .png file that say what it was made with."""

from __future__ import annotations

import json
from typing import Any

from PIL.PngImagePlugin import PngInfo


def png_notes(provenance: dict[str, Any]) -> PngInfo:
    """Return a provenance as the text chunks of a .png: "Software" and, as JSON, "mllm_fast.provenance"."""
    notes = PngInfo()
    notes.add_text("Software", f"mllm-fast {provenance.get('versions', {}).get('mllm-fast', '')}".strip())
    notes.add_itxt("mllm_fast.provenance", json.dumps(provenance, ensure_ascii=False))
    return notes
