import pytest
from torch._inductor.utils import fresh_cache


@pytest.fixture
def fresh_inductor(fresh_compiler, tmp_path):
    """An empty compile cache: a stale one turns failures green."""
    with fresh_cache(dir=str(tmp_path)):
        yield
