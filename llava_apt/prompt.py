"""LLaVA-1.5's prompt ("v1"): ``SYSTEM USER: <image>\\nquestion ASSISTANT: answer</s>USER: ...``"""

from collections.abc import Sequence

IMAGE = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def prompt_pieces(turns: Sequence[tuple[str, str | None]], eos: str) -> list[tuple[str, bool]]:
    """Text of a conversation in pieces, each with whether it is an answer (which is what the loss counts).

    Args:
        turns: (question, answer) pairs; the last answer may be None: the prompt then ends where it should begin.
        eos: the token that ends an answer.
    """
    pieces = [(f"{SYSTEM} ", False)]
    for question, answer in turns:
        pieces.append((f"USER: {question} ASSISTANT:", False))
        if answer is not None:
            pieces.append((f" {answer}{eos}", True))  # the space is a token where a digit follows
    return pieces


def with_images_first(question: str) -> str:
    """Every ``<image>`` of a question moved to its front, a newline behind each, as LLaVA does."""
    count = question.count(IMAGE)
    return f"{IMAGE}\n" * count + question.replace(IMAGE, "").strip()


def question_prompt(question: str, num_images: int) -> str:
    """Prompt for one question; images that it does not mention itself come first."""
    missing = max(num_images - question.count(IMAGE), 0)
    question = with_images_first(IMAGE * missing + question)
    return "".join(text for text, _ in prompt_pieces([(question, None)], eos=""))
