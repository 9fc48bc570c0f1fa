"""``python -m pdmem_lib chat``: a conversation in the terminal, or through a pipe, whose memory stays between runs."""

import sys
from collections.abc import Iterator
from pathlib import Path

from platformdirs import user_data_path

from .backbone import load_backbone
from .journal import STATE
from .memory import MemoryModel
from .session import Session

HELP = """\
A line is written into memory as "You: ...". A line that ends with "?" is asked.
  /ask WORDS       ask, whatever it ends with
  /forget N        forget turn N
  /transcript      what was written and asked
  /snapshot NAME   keep this moment
  /rollback NAME   back to it; without a name: to the beginning of this run
  /help, /quit     (or Ctrl-D)"""
START = "start-of-run"


def open_session(memory: str | None, adapter: str | None, backbone: str | None, keep_text: bool) -> Session:
    """The session in folder ``memory`` (None: the user's own), made with ``adapter`` where it is new.

    Without an adapter a new one is an untrained slot memory, which answers as the bare backbone does.
    """
    folder = Path(memory) if memory else user_data_path("pdmem") / "chat"
    loaded = load_backbone(backbone) if backbone else None
    if adapter:
        return Session(MemoryModel.from_pretrained(adapter, loaded), folder, keep_text)
    if (folder / STATE).is_file():
        return Session.open(folder, loaded, keep_text)
    print("no --adapter given: this memory is untrained, and answers are the bare model's", file=sys.stderr)
    return Session(MemoryModel(loaded or load_backbone("auto"), "slot"), folder, keep_text)


def chat(session: Session, lines: Iterator[str]) -> None:
    """Do what each line says, and print what comes of it; a mistake is one line on stderr, and the chat goes on."""
    session.snapshot(START)
    for line in lines:
        line = line.strip()
        if line in ("/quit", "/exit"):
            break
        try:
            if line and (said := _reply(session, line)):
                print(said, flush=True)
        except ValueError as error:
            print(f"error: {_shown(str(error))}", file=sys.stderr, flush=True)


def _reply(session: Session, line: str) -> str:
    command, _, words = line.partition(" ")
    words = words.strip()
    match command:
        case "/help":
            return HELP
        case "/ask" if words:
            return _shown(session.ask(words))
        case "/forget" if words.isdecimal():
            done = session.forget(int(words))
            return f"forgotten, {'exactly' if done.exact else 'approximately'}: {done.how}"
        case "/transcript":
            return "\n".join(_row(entry) for entry in session.transcript().itertuples()) or "nothing yet"
        case "/snapshot":
            if words == START:
                raise ValueError(f"{START} is the moment at which this run began: give another name")
            session.snapshot(words)
            return f"kept as {words}"
        case "/rollback":
            session.rollback(words or START)
            return f"back to {words or START}: {session.turns} turns"
        case _ if line.startswith("/"):
            raise ValueError(f"{line!r} is no command: /help lists them")
        case _ if line.endswith("?"):
            return _shown(session.ask(line))
        case _:
            (number,) = session.write(f"You: {line}")
            return f"[{number}]"


def _row(entry) -> str:
    number = f"[{entry.turn}]" if entry.kind in ("write", "forgotten") else ""
    text = f"(text not kept, sha256 {entry.sha256[:12]})" if isinstance(entry.sha256, str) else ""
    text = entry.text if isinstance(entry.text, str) else text
    answer = f" -> {entry.answer}" if isinstance(entry.answer, str) else ""
    return _shown(f"{entry.time} {entry.kind:9s} {number:5s} {text}{answer}".rstrip())


def _shown(text: str) -> str:
    """``text`` on one line, with what could steer a terminal (or turn it around) written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def stdin_lines() -> Iterator[str]:
    """Lines as they are typed, with a prompt and a history on a terminal, or as a pipe brings them."""
    if sys.stdin is None:  # closed by whoever started this
        return
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401 - gives input() its editing and history
    else:
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            yield input("> " if typed else "")
        except EOFError:
            return


def run(memory: str | None, adapter: str | None, backbone: str | None, keep_text: bool) -> None:
    """Open the session that the command line names and talk to it until its input ends: ``python -m pdmem_lib chat``."""
    with open_session(memory, adapter, backbone, keep_text) as session:
        print(_shown(f"{session!r}; texts are {'kept there' if keep_text else 'not kept'}; /help"), file=sys.stderr)
        chat(session, stdin_lines())
