"""The mesh and the table of logical axes, on eight CPU devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxembed.sharding import AXES, DATA, MODEL, batch_sharding, make_mesh, parameter_sharding


@pytest.mark.parametrize(("model_parallel", "data"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_the_default_mesh_takes_every_device(model_parallel: int, data: int) -> None:
    """Groups of neighbours share one copy of the weights; each device stands in it once."""
    mesh = make_mesh(model_parallel=model_parallel)
    assert dict(mesh.shape) == {DATA: data, MODEL: model_parallel}
    assert list(mesh.devices.flat) == jax.devices()


def test_a_mesh_of_chosen_devices() -> None:
    """In the order given, here backwards."""
    chosen = jax.devices()[3:1:-1]
    assert list(make_mesh(chosen).devices.flat) == chosen


@pytest.mark.parametrize(("count", "model_parallel"), [(8, 3), (8, 0), (8, -2), (3, 2), (0, 1)])
def test_devices_that_do_not_divide(count: int, model_parallel: int) -> None:
    """The error gives both numbers."""
    with pytest.raises(ValueError, match=f"{count} devices do not divide .* model_parallel={model_parallel}"):
        make_mesh(jax.devices()[:count], model_parallel=model_parallel)


def test_parameters_lie_by_the_table() -> None:
    """Heads and feed-forward over 'model', everything else on every device."""
    mesh = make_mesh(model_parallel=2)
    assert parameter_sharding(mesh, ("embed", "heads"), (6, 8)).spec == PartitionSpec(None, MODEL)
    assert parameter_sharding(mesh, ("mlp", "embed"), (10, 6)).spec == PartitionSpec(MODEL, None)
    assert parameter_sharding(mesh, ("mlp",), (10,)).spec == PartitionSpec(MODEL)
    assert parameter_sharding(mesh, ("vocab", "embed"), (100, 6)).spec == PartitionSpec(None, None)
    assert parameter_sharding(mesh, (), ()).spec == PartitionSpec()


def test_an_axis_that_does_not_divide_is_whole_everywhere() -> None:
    """Seven features over two devices: a copy on each, rather than an error or padding."""
    mesh = make_mesh(model_parallel=2)
    assert parameter_sharding(mesh, ("embed", "mlp"), (6, 7)).spec == PartitionSpec(None, None)
    assert parameter_sharding(mesh, ("embed", "mlp"), (6, 6)).spec == PartitionSpec(None, MODEL)


def test_an_unknown_axis_or_a_wrong_number_of_them() -> None:
    """Mistakes in a model file show when it is loaded, not as a slow model."""
    mesh = make_mesh()
    with pytest.raises(KeyError, match="kv_heads"):
        parameter_sharding(mesh, ("embed", "kv_heads"), (4, 4))
    with pytest.raises(ValueError, match=r"shape \(4, 4\) names the axes \('embed',\)"):
        parameter_sharding(mesh, ("embed",), (4, 4))


def test_batches_lie_over_data() -> None:
    """The first axis is split, the others whole; the parts come back as they went in."""
    mesh = make_mesh(model_parallel=2)
    assert batch_sharding(mesh, 1).spec == PartitionSpec(DATA)
    assert batch_sharding(mesh, 3).spec == PartitionSpec(DATA, None, None)
    array = np.arange(24, dtype=np.float32).reshape(8, 3)
    placed = jax.device_put(array, batch_sharding(mesh, 2))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed, array)


def test_the_table_knows_both_mesh_axes_only() -> None:
    """A typing error in the table would replicate a parameter in silence."""
    assert set(AXES.values()) <= {None, MODEL}
    assert MODEL in AXES.values()
