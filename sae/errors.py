"""The one exception this package raises for what a caller or a file got wrong."""


class SAEError(ValueError):
    """One readable line: what the file or the flag says, and what was expected."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
