"""Chats as datasets have them: a list of turns becomes prompt, system and response.

    {"messages": [{"role": "system", …}, {"role": "user", …}, {"role": "assistant", …}]}
    {"prompt": [{"role": "user", "content": "…"}], "response": "…"}

One question, one answer: that is what is sampled, scored and labelled here, so a chat
of several questions is refused.
"""

from plumbing.files import require


def flatten(row: dict, place: str, responses: bool) -> bool:
    """Replace the turns of a row by texts, in place.

    Args:
        responses: `messages` end with the assistant's turn, which is the response; for
            prompts alone that turn is dropped.

    Returns:
        whether an answer was dropped.

    Raises:
        UserError: naming file, line and what is not one question (and one answer).
    """
    chat = row.pop("messages", None)
    if chat is not None:
        require(isinstance(chat, list), f"{place}: \"messages\" must be a list of "
                "turns, each with \"role\" and \"content\"")
        require("prompt" not in row, f"{place}: the row has both \"messages\" and "
                "\"prompt\"; keep one of them")
    elif isinstance(row.get("prompt"), list):
        chat = row.pop("prompt")
    dropped = False
    if chat is not None:
        turns = [_turn(turn, place) for turn in chat]
        roles = [role for role, _ in turns]
        asked = roles[1:] if roles[:1] == ["system"] else roles
        require(asked in (["user"], ["user", "assistant"]), f"{place}: the turns are "
                f"{', '.join(roles) or 'none'}; one user turn is read, after a system "
                "turn or none, before one answer or none; cut the chat to its first "
                "question")
        if len(asked) < len(roles):
            require("system" not in row, f"{place}: \"system\" stands in the row and "
                    "among its turns; keep one of them")
            row["system"] = turns[0][1]
        row["prompt"] = turns[len(roles) - len(asked)][1]
        if len(asked) == 2:
            dropped = not responses
            if responses:
                require("response" not in row, f"{place}: the turns end with an answer,"
                        " and the row has a \"response\"; keep one of them")
                row["response"] = turns[-1][1]
    if responses and isinstance(row.get("response"), list):
        turns = [_turn(turn, place) for turn in row["response"]]
        require([role for role, _ in turns] == ["assistant"], f"{place}: \"response\" "
                "must be a text, or one assistant turn")
        row["response"] = turns[0][1]
    return dropped


def _turn(turn: object, place: str) -> tuple[str, str]:
    """Role and text; a list of parts is joined if all of them are text."""
    require(isinstance(turn, dict) and isinstance(turn.get("role"), str),
            f"{place}: each turn must have \"role\" (system, user, assistant) and "
            "\"content\"" + ("; rename from → role (human → user, gpt → assistant) and "
                             "value → content"
                             if isinstance(turn, dict) and "from" in turn else ""))
    role, content = turn["role"], turn.get("content")
    require(role in ("system", "user", "assistant"), f"{place}: a turn of role "
            f"{role!r:.99}; known are system, user and assistant")
    require(not turn.get("tool_calls"), f"{place}: tool calls cannot be read; take the "
            "row out")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict)
                 and part.get("type", "text") == "text" else None for part in content]
        require(all(isinstance(text, str) for text in texts), f"{place}: a turn holds "
                "something else than text; take the row out")
        content = "".join(texts)
    require(isinstance(content, str), f"{place}: \"content\" of a turn must be a text")
    return role, content
