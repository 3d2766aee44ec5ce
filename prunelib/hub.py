"""The hub of models and data sets: whether it can be reached, asked once and shortly."""

SECONDS_TO_ANSWER = 5


def unreachable() -> str | None:
    """Why the hub does not answer, None when it does or is not to be asked (``HF_HUB_OFFLINE=1``).

    Without a network its client alone would try again for more than 20 s, for every file.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return None  # the client then reads its cache, and fails at once where that is empty
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=SECONDS_TO_ANSWER)
    except Exception as error:  # httpx or requests, depending on the client's version
        return f"{type(error).__name__}: {error}"
    return None
