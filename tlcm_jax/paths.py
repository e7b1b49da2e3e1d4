"""Where the embedded world lies in a checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINIATURE = ROOT / "miniature"
EMOJI_XL = MINIATURE / "emoji-xl"
SCORER = MINIATURE / "scorer"
