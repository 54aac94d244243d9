"""Text ↔ ids, and chats by a checkpoint's own template.

The template is a stranger's program and the text is a person's. The template gets the
text as it is, so that it may trim or branch on it, and yet no character that a person
typed becomes a piece of a control token: `Tokenizer.chat` says how.
"""

import datetime
import json
import re
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from plumbing.files import UserError, read_json, require
from plumbing.machine import note
from plumbing.words import HALF_SURROGATE

PRIVATE_USE = range(0xE000, 0xF900)  # Unicode gives these characters no meaning


class Tokenizer:
    """Text ↔ ids, and ChatML by the checkpoint's own template.

    Attributes:
        stop_ids: every id that ends a response.
        control: added token → id; most of them are control tokens.
        valid: V' ≤ V, how many ids the tokenizer has; Qwen pads its vocabulary, and
            sampler and loss both cut the rows beyond off the head.
        named: `bos_token` and the like → text, as templates ask for them.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            # With these the library panics, or encodes at random.
            odd = [key for key in ("continuing_subword_prefix", "dropout")
                   if raw["model"].get(key)]
            if odd:
                raise ValueError(f"{odd[0]} is set; a plain byte-level BPE has none")
            self._added = {t["content"]: t for t in raw["added_tokens"]}
            self.control = {token: t["id"] for token, t in self._added.items()}
            # `_render` breaks such a token up where a person has typed it.
            if not all(re.search(r"\S\S", token) for token in self.control):
                raise ValueError("an added token is blank or a single character; text "
                                 "could not be told from it")
            self._whole = tokenizers.Tokenizer.from_file(str(path))
            # Training scripts leave these behind; a prompt must not be cut in silence.
            self._whole.no_truncation()
            self._whole.no_padding()
            # A second tokenizer that has never heard of control tokens: whatever a
            # person types, it can only produce ordinary text.
            self._plain = tokenizers.Tokenizer(self._whole.model)
            self._plain.normalizer = self._whole.normalizer
            self._plain.pre_tokenizer = self._whole.pre_tokenizer
        except BaseException as error:
            # The library raises bare Exception, and panics with a class of its own.
            if not isinstance(error, Exception) and "Panic" not in type(error).__name__:
                raise
            raise UserError(f"cannot read {path}: {error}; it must be a complete "
                            "tokenizer.json of a Qwen checkpoint") from error
        ids = self._whole.get_vocab(with_added_tokens=True)
        self.valid = max(ids.values(), default=-1) + 1
        # The library gives control tokens behind a gap other ids than the file does.
        renumbered = any(ids.get(token) != i for token, i in self.control.items())
        require(len(set(ids.values())) == self.valid > 0 and not renumbered,
                f"{path}: ids are not 0 to {self.valid - 1} without gaps")
        config = folder / "tokenizer_config.json"
        settings = read_json(config) if config.is_file() else {}
        self.named = self._read_names(folder, settings)
        self.template = read_template(folder, settings)
        self.stop_ids = self._read_stops(folder)
        self._split = self._pattern(self.control)
        self._in_responses = self._pattern(self._ordinary())

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which control tokens mean nothing."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_response(self, text: str) -> list[int]:
        """Ids of an answer, as the policy samples them.

        Added tokens that are not special (`<think>`, `<tool_call>`) are words of an
        answer, each with an id of its own; control tokens mean nothing here, either.
        """
        return self._ids(self._in_responses.split(text))

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens left out."""
        return self._whole.decode(ids, skip_special_tokens=True)

    def chat(self, prompt: str, system: str | None = None) -> list[int]:
        """Ids of one user turn and the opening of the answer.

        The rendered text is cut at the control tokens that are the template's own; the
        pieces between are encoded as ordinary text, so `<|im_start|>` typed by a person
        stays text. `_render` says which tokens are whose.

        Raises:
            UserError: the prompt is empty or not UTF-8, or the template is no chat's.
        """
        require(bool(prompt.strip()), "the prompt is empty; write a question")
        texts = [prompt] if system is None else [system, prompt]
        rendered, mark = self._render(texts)
        ids = self._ids([piece.replace(mark, "")
                         for piece in self._split.split(rendered)])
        bare = rendered.replace(mark, "").strip() == prompt.strip()
        require(len(ids) > 1 and not bare, "the checkpoint's chat template adds "
                "nothing to the prompt; use an Instruct checkpoint")
        return ids

    def _render(self, texts: list[str]) -> tuple[str, str]:
        """The rendered chat, and a mark that breaks up what a person typed.

        The mark is a character that occurs nowhere else. Between all characters that
        are no blanks, it survives trimming, case and most else that templates do. If
        the rendering, marks removed, is that of the bare text, the template did the
        same to both, and no control token that was typed, or made of typed characters,
        is whole in it.
        Otherwise the template looks at words or lengths, and marks disturb it. Then
        only characters that may open a control token are followed by one. The bare
        rendering is taken if it has the same control tokens; if it has others, they
        were typed.
        """
        for text in texts:
            require(not HALF_SURROGATE.search(text), "the text is not UTF-8: it holds "
                    "bytes that are no letters")
        clock = datetime.datetime.now()  # one for all renderings of this chat
        bare = self._fill(texts, clock)
        used = set(bare).union(*texts)
        mark = next((c for c in map(chr, PRIVATE_USE) if c not in used), None)
        require(mark is not None, "the text holds every private-use character")
        for k, text in enumerate(texts):
            other = [*texts[:k], mark + text + mark, *texts[k + 1:]]
            require(not text.strip() or self._fill(other, clock) != bare,
                    "the checkpoint's chat template drops what the person said")
        openers = "".join(sorted({token[0] for token in self.control}))
        behind = f"(?<=[{re.escape(openers)}])" if openers else "(?!)"
        for places in (rf"(?<=\S)(?=\S)|{behind}", behind):
            rendered = self._fill([re.sub(places, mark, t) for t in texts], clock)
            if rendered.replace(mark, "") == bare:
                return rendered, mark
        same = self._split.split(rendered)[1::2] == self._split.split(bare)[1::2]
        return (bare if same else rendered), mark

    def _fill(self, texts: list[str], clock: datetime.datetime) -> str:
        """The template's text for [system and] user; errors become one line."""
        roles = ("system", "user")[-len(texts):]
        messages = [{"role": role, "content": text}
                    for role, text in zip(roles, texts, strict=True)]
        try:
            # Qwen3 would think aloud first, and a short answer would be all thought.
            rendered = self.template.render(
                self.named, messages=messages, add_generation_prompt=True, tools=None,
                documents=None, enable_thinking=False, strftime_now=clock.strftime)
        except TemplateRefusal as error:
            raise UserError("the checkpoint's chat template refuses this chat: "
                            f"{error}") from error
        except Exception as error:  # a stranger's program may raise anything
            raise UserError(f"the checkpoint's chat template fails: {error}") from error
        require(not HALF_SURROGATE.search(rendered), "the checkpoint's chat template "
                "writes text that is not UTF-8")
        return rendered

    def _pattern(self, tokens: dict[str, int]) -> re.Pattern:
        """Cuts a text at these tokens, the longest first.

        A token may take the blanks beside it along, as the library lets it.
        """
        pieces = []
        for token in sorted(tokens, key=len, reverse=True):
            about = self._added[token] if token == token.strip() else {}
            before, after = (r"\s*" if about.get(side) else ""
                             for side in ("lstrip", "rstrip"))
            pieces.append(before + re.escape(token) + after)
        return re.compile("(" + ("|".join(pieces) or "(?!)") + ")")  # (?!): never

    def _ids(self, pieces: list[str]) -> list[int]:
        """Ids of text cut by `_pattern`: every second piece is a token."""
        ids = []
        for number, piece in enumerate(pieces):
            if number % 2:
                token = piece if piece in self.control else piece.strip()
                ids.append(self.control[token])
            else:
                ids += self.encode(piece)
        return ids

    def _ordinary(self) -> dict[str, int]:
        """Added tokens that are words of an answer: they neither end nor frame it."""
        kept = {"<|im_start|>", "<|im_end|>"}
        for value in self.named.values():
            kept |= {value} if isinstance(value, str) else set(value)
        return {token: i for token, i in self.control.items()
                if self._added[token].get("special") is False
                and i not in self.stop_ids and token not in kept}

    def _read_names(self, folder: Path, settings: dict) -> dict[str, str | list[str]]:
        """`bos_token` and the like, from wherever transformers takes them."""
        legacy = folder / "special_tokens_map.json"
        if "added_tokens_decoder" not in settings and legacy.is_file():
            settings = settings | read_json(legacy)
        own = settings.get("extra_special_tokens")
        settings = settings | (own if isinstance(own, dict) else {})
        if "<|endoftext|>" in self.control:  # Qwen's, where the files say nothing
            settings = dict.fromkeys(
                ("eos_token", "pad_token", "unk_token"), "<|endoftext|>") | settings

        def content(value: object) -> object:
            return value.get("content") if isinstance(value, dict) else value

        named = {key: content(value) for key, value in settings.items()
                 if key.endswith("_token")}
        named = {key: value for key, value in named.items() if isinstance(value, str)}
        more = settings.get("additional_special_tokens")
        if isinstance(more, list):
            named["additional_special_tokens"] = [
                text for text in map(content, more) if isinstance(text, str)]
        return named

    def _read_stops(self, folder: Path) -> list[int]:
        stops: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            if (folder / name).is_file():
                named = read_json(folder / name).get("eos_token_id")
                named = named if isinstance(named, list) else [named]
                stops |= {stop for stop in named if type(stop) is int}
        # Instruct models end a turn with <|im_end|>, and a document with <|endoftext|>.
        stops |= {self.control.get("<|im_end|>"), self.control.get("<|endoftext|>")}
        stops = {s for s in stops if isinstance(s, int) and 0 <= s < self.valid}
        require(bool(stops), f"{folder} names no end token")
        return sorted(stops)


# ------------------------------------------------------------------------- templates


class TemplateRefusal(Exception):
    """The template itself says, with `raise_exception`, why it will not render."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}` … `{% endgeneration %}`: what other trainers learn from."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The body, in a scope of its own, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


def read_template(folder: Path, settings: dict) -> jinja2.Template:
    """The chat template of a checkpoint.

    Newer tools put it into `chat_template.jinja`, and read that first.

    Args:
        settings: what `tokenizer_config.json` holds.
    """
    source, separate = settings.get("chat_template"), folder / "chat_template.jinja"
    if separate.is_file():
        source = separate.read_text(encoding="utf-8", errors="replace")
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source
                  if isinstance(entry, dict) and isinstance(entry.get("name"), str)}
    if isinstance(source, dict):
        require("default" in source, f"{folder}/tokenizer_config.json has no "
                f"chat_template named default, only {', '.join(source) or 'none'}; "
                "give one of them that name")
        source = source["default"]
    require(isinstance(source, str), f"{folder}/tokenizer_config.json has no "
            "chat_template; use an Instruct checkpoint")
    if "strftime_now" in source:
        note(f"the chat template of {folder} writes the time into every prompt: on "
             "another day the same prompt has other ids")
    # The template is a stranger's program: the sandbox keeps it from doing more than
    # rendering text.
    room = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols])
    room.globals["raise_exception"] = _raise
    room.filters["tojson"] = _to_json
    try:
        return room.from_string(source)
    except Exception as error:  # RecursionError, when brackets nest deeply
        raise UserError(f"{folder}: broken chat template: {error}") from error


def _raise(message: object) -> None:
    raise TemplateRefusal(message)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple | None = None, sort_keys: bool = False) -> str:
    """JSON as transformers writes it: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent,
                      separators=separators, sort_keys=sort_keys)
