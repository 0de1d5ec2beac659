import pytest
from django.db import OperationalError, connections

from tests.support.consumer_process import ManageProcess
from tests.support.databases import private_alias, routed_over, url_of_test_database
from tests.support.tcp_proxy import TcpProxy
from tests.testapp.models import Effect

pytestmark = pytest.mark.server

# Both drivers report a connection that ended under a statement with one of these numbers or words.
CONNECTION_LOST = r"(?i)connection|2006|2013|terminat|reset"


@pytest.mark.parametrize("immediate", [False, True])
def test_private_server_keeps_what_was_committed_over_a_restart(private_server, immediate):
    with private_alias(private_server.create_database()) as alias:
        Effect.objects.using(alias).create(task_key="before")

        private_server.restart(immediate=immediate)

        with pytest.raises(OperationalError, match=CONNECTION_LOST):
            Effect.objects.using(alias).count()
        connections[alias].close()
        assert Effect.objects.using(alias).count() == 1


def test_stopped_private_server_is_not_reachable(private_server):
    with private_alias(private_server.create_database(is_migrated=False)) as alias:
        private_server.stop(immediate=True)

        with pytest.raises(OperationalError):
            connections[alias].ensure_connection()

    private_server.start()
    assert private_server.is_running


def test_lost_answer_to_a_commit_leaves_the_row_committed(transactional_db, database_proxy):
    with private_alias(url_of_test_database(port=database_proxy.port)) as alias:
        connection = connections[alias]
        connection.set_autocommit(False)
        Effect.objects.using(alias).create(task_key="committed")
        rule = database_proxy.lose_answer(after_match=b"COMMIT")

        with pytest.raises(OperationalError, match=CONNECTION_LOST):
            connection.commit()

        assert rule.fired.is_set()
        assert Effect.objects.filter(task_key="committed").count() == 1


def test_test_itself_can_be_sent_through_the_proxy(transactional_db, database_proxy):
    with routed_over(database_proxy.port):
        Effect.objects.create(task_key="over the proxy")
        assert database_proxy.connection_count == 1
        database_proxy.cut()
        with pytest.raises(OperationalError, match=CONNECTION_LOST):
            Effect.objects.count()

    assert Effect.objects.count() == 1


def test_process_can_be_sent_through_the_proxy(transactional_db, database_proxy):
    code = "from tests.testapp.models import Effect; print('rows', Effect.objects.count())"
    url = url_of_test_database(port=database_proxy.port)

    with ManageProcess("shell", "--no-imports", "-c", code, database_url=url) as process:
        process.wait_for_line("rows 0")


def test_proxy_before_a_private_server_can_be_made_by_hand(private_server):
    with TcpProxy("127.0.0.1", private_server.port) as proxy:
        url = private_server.create_database().replace(
            f":{private_server.port}/", f":{proxy.port}/"
        )
        with private_alias(url) as alias:
            assert Effect.objects.using(alias).count() == 0
            proxy.cut()
            with pytest.raises(OperationalError, match=CONNECTION_LOST):
                Effect.objects.using(alias).count()
