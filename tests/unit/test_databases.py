from pathlib import Path

import pytest

from testproject.databases import database_from_url, url_from_database


def test_server_url_becomes_a_database_entry():
    entry = database_from_url("postgresql://anna:s%40fe@db.example:5433/shop?sslmode=disable")

    assert entry == {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "shop",
        "USER": "anna",
        "PASSWORD": "s@fe",
        "HOST": "db.example",
        "PORT": "5433",
        "OPTIONS": {"sslmode": "disable"},
        "TEST": {"NAME": "test_shop"},
    }


def test_suffix_is_put_before_the_extension_of_a_file():
    entry = database_from_url("sqlite:////var/lib/shop.sqlite3", suffix="_other")

    assert entry["NAME"] == Path("/var/lib/shop_other.sqlite3")
    assert entry["TEST"] == {"NAME": "/var/lib/test_shop_other.sqlite3"}


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////var/lib/with%20space.sqlite3",
        "sqlite:///relative.sqlite3",
        "postgresql://postgres@127.0.0.1:5432/firefly",
        "mysql://anna:s%40fe@127.0.0.1:3306/firefly",
    ],
)
def test_url_survives_a_round_trip(url):
    assert url_from_database(database_from_url(url)) == url


def test_second_database_of_a_process_on_the_test_database_is_that_of_the_test():
    in_the_test = database_from_url("sqlite:////tmp/shop.sqlite3", suffix="_other")["TEST"]["NAME"]
    test_url = "sqlite:///" + database_from_url("sqlite:////tmp/shop.sqlite3")["TEST"]["NAME"]

    assert str(database_from_url(test_url, suffix="_other")["NAME"]) == in_the_test


def test_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match=r"oracle:// is no database URL; use one of sqlite"):
        database_from_url("oracle://system@localhost/xe")
