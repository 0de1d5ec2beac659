import pytest
from django.db import IntegrityError, connection, transaction

from tests.conftest import VENDOR
from tests.support.threads import Concurrent
from tests.testapp.models import Effect, Seat, Ticket


def test_run_uses_the_vendor_it_says():
    assert connection.vendor == VENDOR


@pytest.mark.django_db(databases=["default", "other"])
def test_second_alias_is_another_database():
    Effect.objects.using("other").create(task_key="there")

    assert not Effect.objects.exists()
    assert Effect.objects.using("other").exists()


@pytest.mark.django_db(transaction=True)
def test_concurrent_call_has_a_connection_of_its_own():
    with transaction.atomic():
        if connection.vendor != "sqlite":
            # SQLite's transactions are immediate here, so a second writer would wait.
            Effect.objects.create(task_key="uncommitted")
        assert Concurrent(Effect.objects.count).result() == 0


@pytest.mark.postgresql
@pytest.mark.django_db
def test_sessions_outside_django_have_a_zone_other_than_utc():
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT setconfig FROM pg_db_role_setting JOIN pg_database ON setdatabase = oid"
            " WHERE datname = current_database()"
        )
        assert cursor.fetchone() == (["TimeZone=America/New_York"],)


@pytest.mark.mysql
@pytest.mark.django_db
def test_sessions_have_a_zone_other_than_utc():
    with connection.cursor() as cursor:
        cursor.execute("SELECT @@session.time_zone")
        assert cursor.fetchone() == ("-05:00",)


@pytest.mark.sqlite
@pytest.mark.django_db(transaction=True)
def test_sqlite_runs_in_wal_mode():
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA journal_mode")
        assert cursor.fetchone() == ("wal",)


@pytest.mark.postgresql
@pytest.mark.django_db(transaction=True)
def test_taken_seat_fails_at_commit():
    Seat.objects.create(number=1)
    transaction.set_autocommit(False)
    Seat.objects.create(number=1)
    assert Seat.objects.count() == 2

    with pytest.raises(IntegrityError):
        transaction.commit()
    transaction.rollback()
    transaction.set_autocommit(True)


@pytest.mark.django_db(transaction=True)
def test_ticket_without_an_effect_fails_at_commit_at_the_latest():
    with pytest.raises(IntegrityError), transaction.atomic():
        Ticket.objects.create(effect_id=1)
