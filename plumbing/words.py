"""Words for people: what cannot be shown must end no run.

A terminal may know fewer letters than a response has, its other end may be closed
(`python grpo.py | head`), the file behind it full. What a run is for goes into its
folder; what it says is a convenience.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

# Half a surrogate pair: how Python hands on bytes that are no UTF-8.
HALF_SURROGATE = re.compile("[\ud800-\udfff]")


class Lasting:
    """A stream that goes on: letters it has not are escaped, a closed end is silence.

    Everything but the writing is the stream's own.
    """

    def __init__(self, stream) -> None:
        self._stream, self._dead = stream, False

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write as much of the text as the stream can show."""
        try:
            self._attempt(lambda: self._stream.write(text))
        except UnicodeEncodeError as error:
            code = error.encoding
            shown = text.encode(code, "backslashreplace").decode(code)
            self._attempt(lambda: self._stream.write(shown))
        return len(text)

    def flush(self) -> None:
        """Hand on what is buffered."""
        self._attempt(self._stream.flush)

    def _attempt(self, act) -> None:
        if self._dead:
            return
        try:
            act()
        except UnicodeEncodeError:
            raise
        except (BlockingIOError, RuntimeError):
            pass  # a slow reader; or a signal's words in the midst of others
        except (OSError, ValueError) as error:  # closed, full, gone
            self._dead = True
            self._discard()
            if self._stream is sys.__stdout__ and not isinstance(error,
                                                                 BrokenPipeError):
                print(f"note: the output cannot be written ({error}); going on "
                      "without it", file=sys.stderr)

    def _discard(self) -> None:
        # What is buffered would fail again when Python ends, and be its exit status.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def program() -> str:
    """What a person has typed: `grpo.py`, or `python -m methods`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return os.path.basename(sys.argv[0])
    return "python -m " + spec.name.removesuffix(".__main__")


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Let stdout and stderr be `Lasting` until the block ends."""
    with contextlib.ExitStack() as stack:
        # stdout last: it ends first, while its note can still be shown.
        for name, redirect in (("stderr", contextlib.redirect_stderr),
                               ("stdout", contextlib.redirect_stdout)):
            # None where the shell has closed it: `python grpo.py 2>&-`.
            stream = getattr(sys, name) or stack.enter_context(
                open(os.devnull, "w", encoding="utf-8"))
            lasting = Lasting(stream)
            stack.enter_context(redirect(lasting))
            stack.callback(lasting.flush)
        yield
