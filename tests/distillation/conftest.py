import pytest

from tests.support.gaussian_world import world_of


@pytest.fixture(scope="session")
def world():
    """Stable Diffusion's schedule, latents like an image's."""
    return world_of("eps", 3)


@pytest.fixture(scope="session", params=[("eps", 3), ("flow-shift-3", 1)], ids=["vp", "flow"])
def any_world(request):
    """Both kinds of process, latents of both ranks."""
    return world_of(*request.param)
