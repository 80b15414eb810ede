import pytest

from diffusion.errors import AntherError
from diffusion.secrecy import check_config, check_words, hidden

TOKEN = "hf_0123456789abcdef"


@pytest.mark.parametrize(
    "word",
    [
        "data.path=https://me:hunter22@example.org/x.zip",
        "data.path=https://hunter22@example.org/x.zip",
        "data.path=https://example.org/x.zip?a=1&token=hunter22",
        "data.path=https://example.org/x.zip?X-Amz-Signature=hunter22",
        "+publish.token=hunter22",
        "++logger.wandb.api_key=hunter22",
        "password=hunter22",
        f"name={TOKEN}",
    ],
)
def test_a_secret_is_refused_and_not_repeated(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    key, _, value = word.partition("=")
    for check in (lambda: check_words([word]), lambda: check_config({"deep": {key.lstrip("+"): [value]}})):
        if check.__code__.co_names[0] == "check_config" and "://" not in value and value != TOKEN:
            continue  # an entry of a list has a number for its name
        with pytest.raises(AntherError) as error:
            check()
        assert "hunter22" not in str(error.value)
        assert TOKEN not in str(error.value)


def test_what_only_looks_like_one_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("HF_TOKEN", "")
    words = ["tokens=5", "data.path=https://example.org/a@b.zip", "name=abc", "prompts=['me@home: a rose']"]
    check_words([*words, "logger.wandb.api_key=null", "x.max_tokens=7", "--help"])
    check_config({"module": {"conditioner": {"tokenizer": "x"}}, "a": [1, None, True]})


def test_messages_hide_what_they_quote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", TOKEN)
    text = hidden(f"cannot read https://me:hunter22@example.org/x.zip?sig=abc&b=1 with {TOKEN}")
    assert text == "cannot read https://[hidden]@example.org/x.zip?sig=[hidden]&b=1 with [hidden]"
