"""The one exception this package raises for what a caller or a file got wrong."""


class SAEError(ValueError):
    """One readable line: what the file or the flag says, and what was expected.

    What a file says may be written by a stranger, so characters that a terminal would obey (escape
    sequences, marks that turn the direction of text) are spelled out.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))
