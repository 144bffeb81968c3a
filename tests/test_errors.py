"""Passwords never appear in messages or reports."""

import pytest

from tq_lightning.errors import first_line, hide_password, message_of, one_line


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:se/cr/et@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:se@cret@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:se%40cr%2Fet@h:5432/db", "postgresql://u:***@h:5432/db"),
        ("postgresql://u:se:cr?et#@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:@h/db", "postgresql://u:***@h/db"),
        ("postgresql://:secret@h/db", "postgresql://:***@h/db"),
        ("postgresql://u:sec ret@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:se cr@et@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:se cret@h/db from me@x.org", "postgresql://u:***@h/db from me@x.org"),
        ("postgresql+psycopg://u:secret@[::1]:5432/db", "postgresql+psycopg://u:***@[::1]:5432/db"),
        ("postgresql://h/db?user=u&password=secret", "postgresql://h/db?user=u&password=***"),
        ("postgresql://h/db?password=se%26cret&a=b", "postgresql://h/db?password=***&a=b"),
        ("mysql://u:a@h/db?sslpassword=secret&x=1", "mysql://u:***@h/db?sslpassword=***&x=1"),
        ("postgresql://u:pw@h:1/db?password=p@sstail", "postgresql://u:***@h:1/db?password=***"),
        (
            "postgresql://u:pw@h/db?sslpassword=p@ss&a=b",
            "postgresql://u:***@h/db?sslpassword=***&a=b",
        ),
        ("postgresql://h:5432/db?password=se/cr@et&a=b", "postgresql://h:5432/db?password=***&a=b"),
        ("postgresql://h/db?user=u&password=a;b'c)d", "postgresql://h/db?user=u&password=***"),
        ("postgresql://h/db?PASSWORD=a?b=c", "postgresql://h/db?PASSWORD=***"),
        ("postgresql://u:a?password=b@h/db", "postgresql://u:***@?password=***"),
        # nothing to hide
        ("postgresql://u@h:5432/db?host=me@x", "postgresql://u@h:5432/db?host=me@x"),
        ("postgresql://u@h:5432/db", "postgresql://u@h:5432/db"),
        ("postgresql://h:5432/db", "postgresql://h:5432/db"),
        ("sqlite:////home/me@host/a:b/study.db", "sqlite:////home/me@host/a:b/study.db"),
        ("journal:/data/study.log", "journal:/data/study.log"),
    ],
)
def test_password_of_a_url_is_hidden(url, shown):
    assert hide_password(url) == shown


@pytest.mark.parametrize(
    "text",
    [
        "(psycopg.OperationalError) connection to 'postgresql://u:se/c@ret@h/db' failed: timeout",
        "python -m tq_lightning report postgresql://u:se/c@ret@h/db --out report",
        "Could not parse postgresql://u:se/c@ret@h/db; or mysql://v:se/c@ret@i/db",
        'invalid dsn "host=h user=u password=se/c@ret dbname=db"',
        "invalid dsn password='se/c@ret more'",
        r"invalid dsn password='se/c\'@ret' dbname=db",
        "invalid dsn host=h password=se/c;@ret&x dbname=db",
        "--storage 'postgresql://u:x@h/db?password=se/c@ret' --out report",
    ],
)
def test_passwords_inside_a_text_are_hidden(text):
    shown = hide_password(text)
    assert "se/c" not in shown and "ret" not in shown.replace("interpret", "")
    assert "***" in shown


def test_text_around_a_password_is_kept():
    text = "cannot reach 'postgresql://h:5432/db?password=x'; or (postgresql://u:x@h/db)"
    shown = "cannot reach 'postgresql://h:5432/db?password=***'; or (postgresql://u:***@h/db)"
    assert hide_password(text) == shown


def test_text_without_passwords_is_unchanged():
    text = "cannot reach postgresql://u:secret@h/db (timeout); start it"
    assert hide_password(text) == "cannot reach postgresql://u:***@h/db (timeout); start it"


def test_error_is_reduced_to_its_first_line():
    assert first_line(RuntimeError("postgresql://u:pw@h/db\nfurther lines")) == (
        "postgresql://u:***@h/db"
    )
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_message_is_one_line_of_limited_length():
    error = RuntimeError("a message\n  of two lines")
    assert message_of(error) == "a message of two lines"
    assert message_of(error, 9) == "a message"


def test_control_characters_are_escaped_and_other_text_is_kept():
    assert one_line("a\nb\r\x1b[2J\u2028c") == "a\\nb\\r\\x1b[2J\\u2028c"
    assert one_line("größe  🙂 \\n\udcff") == "größe  🙂 \\n\udcff"
