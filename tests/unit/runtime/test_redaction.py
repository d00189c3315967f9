"""Texts that `redact` leaves as they are, and texts in which it hides a secret; tests/laws/test_law_11_secrets.py has more."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cloudtrain.runtime.redaction import SECRET_NAME, redact

READABLE = [
    "NoCredentialsError: Unable to locate credentials",
    "Unable to locate credentials: run aws configure",
    "botocore.exceptions.NoCredentialsError: Unable to locate credentials",
    "PartialCredentialsError: Partial credentials found in env, missing: AWS_SECRET_ACCESS_KEY",
    "Invalid token: the token has expired",
    "credentials: not found",
    "TokenRetrievalError: Error when retrieving token from sso: Token has expired and refresh failed",
    "DefaultCredentialsError: Your default credentials were not found. To set up Application Default Credentials, see https://cloud.google.com/docs/authentication",
    "ClientAuthenticationError: DefaultAzureCredential failed to retrieve a token from the included credentials.",
    "EnvironmentCredential: EnvironmentCredential authentication unavailable.",
    "ManagedIdentityCredential: no response",
    "SignatureDoesNotMatch: The request signature we calculated does not match the signature you provided. Check your key and signing method.",
    "tokens: 500",
    "max_new_tokens: 20",
    "num_tokens=512",
    "--tokenizer=bert",
    "tokenizer=bert-base",
    "tokenizer: bert-base",
    "tokenizer_name: bert",
    "keyword=abc",
    "monkey=banana",
    "password: required",
    "token: missing",
    "KeyError: 'token'",
    "authorization: failed",
    "credential: None",
    "token: None",
    "secret: true",
    "pad_token: '<pad>'",
    "eos_token=</s>",
    "special_tokens_map.json: missing",
    "--max_tokens=100",
    "the key: value",
    "access key: denied",
    "the credentials: cannot be read",
    "AuthorizationFailure: This request is not authorized",
    "InvalidAccessKeyId: The AWS Access Key Id you provided does not exist",
    "ExpiredToken: The provided token has expired",
    "tokenizer.json: 5 bytes",
    "design=flat",
    "signal=9",
    "InvalidToken: The provided token is malformed or otherwise invalid.",
    "use_auth_token=None",
    "authorization: required",
    "http://host:9000/a@b",
    "UnauthorizedSSOTokenError: The SSO session has expired",
    "checkpoint-5/tokenizer.json: 5 bytes",
    "hotkey=ctrl-c",
    "TOKENIZERS_PARALLELISM: none",
    "keyboard: us",
]
HIDDEN = [
    ("password: 123456", "123456"),
    ("password=hunter2", "hunter2"),
    ("token: abcdefghijkl", "abcdefghijkl"),
    ("'secret': 'not so secret'", "not so"),
    ("api_key=abc", "abc"),
    ("apikey=abc1", "abc1"),
    ("AccountKey=abc/d==;x", "abc/d=="),
    ("Authorization: Bearer abcdef", "abcdef"),
    ("aws_access_key_id: XKIAIOSFODNN7", "XKIAIOSFODNN7"),
    ("SecretAccessKey: theabc", "theabc"),
    ("token: the-real-one", "the-real-one"),
    ("token: not4you", "not4you"),
    ("https://h/c?sig=abc&x=1", "abc"),
    ("--hub_token=hf_x", "hf_x"),
    ('password: "the"', '"the"'),
    ("token=none-of-it", "none-of-it"),
    ("secret: true+/9", "true+/9"),
    ("passphrase=no", "=no"),
    ("X-Amz-Signature=abc", "abc"),
    ("tokens=abc12", "abc12"),
    ("token: 99887766", "99887766"),
    ("credential: AKx9/2020", "AKx9"),
    ("password: is!x9", "is!x9"),
    ("api_key: abcd", "abcd"),
    ("s3://user:the@bucket", "user:the"),
    ("the password: correct-horse", "correct-horse"),
]
SUBJECTS = [
    *(
        "Invalid token",
        "credentials",
        "EnvironmentCredential",
        "InvalidAccessKeyId",
        "the password",
        "authorization",
    ),
    *("NoCredentialsError", "ExpiredToken", "InvalidToken", "secret", "api_key"),
]
SENTENCES = [
    *(
        "the token has expired",
        "Unable to locate credentials",
        "not found",
        "is missing, set AWS_PROFILE",
        "no response",
    ),
    *(
        "cannot be read",
        "must be a text",
        "None",
        "required.",
        "EnvironmentCredential authentication unavailable.",
    ),
]
secrets = st.text(string.ascii_letters + string.digits + "+/_-", min_size=8, max_size=40).filter(
    lambda text: any(char.isdigit() for char in text) and not text.isdigit()
)


@pytest.mark.parametrize("text", READABLE)
def test_a_text_without_a_secret_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(("text", "secret"), HIDDEN)
def test_a_secret_is_hidden(text: str, secret: str) -> None:
    assert secret not in redact(text)


@given(st.lists(st.tuples(st.sampled_from(SUBJECTS), st.sampled_from(SENTENCES)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_sentences_about_secrets_stay_readable(parts: list[tuple[str, str]]) -> None:
    text = "; ".join(f"{subject}: {sentence}" for subject, sentence in parts)
    assert redact(text) == text


@given(
    st.sampled_from(SUBJECTS),
    st.sampled_from(SENTENCES),
    secrets,
    st.sampled_from(["{}", "'{}'", "Bearer {}"]),
)
@settings(max_examples=100, deadline=None)
def test_a_secret_among_such_sentences_is_hidden(
    subject: str, sentence: str, secret: str, shown: str
) -> None:
    text = f"{subject}: {sentence}; password: {shown.format(secret)}; token={secret} {sentence}"
    assert secret not in redact(text)


@pytest.mark.parametrize(
    "name", ["tokenizer", "TOKENIZER_NAME", "keyboard", "monkey", "author", "keyword_args", "lr"]
)
def test_options_that_only_sound_like_secrets_are_shown(name: str) -> None:
    assert SECRET_NAME.search(name) is None


@pytest.mark.parametrize(
    "name",
    ["hub_token", "AccountKey", "apikey", "AWS_SECRET_ACCESS_KEY", "key", "passwd", "SAS", "max_tokens"],
)
def test_options_that_may_be_secrets_are_not(name: str) -> None:
    assert SECRET_NAME.search(name) is not None
