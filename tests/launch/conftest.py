import pytest

from tests.support.fake_gcloud import Cloud


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)
