"""A window over a text of any length, and which packages take one."""

from __future__ import annotations

from dataclasses import dataclass

from expe_edge.errors import GenerationError
from expe_edge.package.manifest import Manifest

#: Encodings beside relative ExPE whose keys and values carry no positions, and whose scores know distances alone.
WITHOUT_POSITIONS = ("alibi", "relative", "none")


@dataclass(frozen=True)
class Window:
    """A cache of fixed size for text of any length: the first tokens, and the last.

    Attributes:
        size: the most tokens that are held besides the sinks. A quarter of them, the oldest, is dropped whenever there
            is no room, so that every token sees at least the last three quarters.
        sinks: first tokens that are kept for ever (Xiao et al., 2024); they stand right before the window.
    """

    size: int
    sinks: int = 4

    def __post_init__(self) -> None:
        for name, setting, least in (("size", "window", 1), ("sinks", "sinks", 0)):
            if getattr(self, name) < least:
                raise GenerationError(f"`{setting}` is {getattr(self, name)}; at least {least}")

    @property
    def capacity(self) -> int:
        """The most tokens held."""
        return self.sinks + self.size

    @property
    def block(self) -> int:
        """Tokens dropped at once."""
        return max(1, self.size // 4)


def window_refusal(manifest: Manifest) -> str | None:
    """Say why a package takes no window: what stays in the cache holds the position that it once had. None where not.

    So it is where the encoding puts positions into keys, values or embeddings, or limbs of them into scores.
    """
    model = manifest.model
    encoding, where = model["positional"], model["positional_parameters"].get("where")
    relative = encoding == "expe" and where == "key" and manifest.positions == "folded"
    if relative or encoding in WITHOUT_POSITIONS:
        return None
    form = f"{encoding} with positions in {where.replace('_', ' and ')}" if where not in (None, "key") else encoding
    inline = " with positions inline" if manifest.positions == "inline" else ""
    return (
        f"`window`: tokens of {form}{inline} cannot be counted anew when others are dropped; leave `window` out "
        "or take a package of the relative form, folded, of alibi, relative or none"
    )
