import pytest

from tests.support.icons import write_world


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path)
