"""Files cut to fewer planes, completed from a rest file, compressed and decompressed."""

import pytest
import torch

from tq_lightning import bit_width, load_packed, save_packed
from tq_lightning.errors import UserError
from tq_lightning.export.packed.container import Container, write_container
from tq_lightning.export.packed.edit import join, read_all, repack, write_rest


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_narrow_and_rest_files_join_to_the_same_bytes(net, packed, bits, tmp_path):
    narrow, rest, whole = (tmp_path / n for n in ("narrow", "rest", "whole"))
    save_packed(net[0], narrow, max_bits=bits)
    sizes = write_rest(packed, rest, bits)
    assert not any(name in sizes for name in ("float", "scale", "plane0", f"norm{bits}"))
    join(narrow, rest, whole)
    assert whole.read_bytes() == packed.read_bytes()
    with torch.no_grad(), bit_width(net[0], bits, "truncate"):
        assert torch.equal(load_packed(narrow)(net[1]), net[0](net[1]))
    with pytest.raises(UserError, match=f"stores {bits} bit planes"):
        load_packed(narrow, bits=bits + 1)


def test_narrowed_file_equals_a_file_saved_at_that_width(net, packed, tmp_path):
    save_packed(net[0], tmp_path / "saved", max_bits=3)
    repack(packed, tmp_path / "cut", max_bits=3)
    assert (tmp_path / "saved").read_bytes() == (tmp_path / "cut").read_bytes()


def test_compression_round_trip_is_lossless(net, packed, tmp_path):
    repack(packed, tmp_path / "z", compress=True)
    repack(tmp_path / "z", tmp_path / "plain")
    assert (tmp_path / "plain").read_bytes() == packed.read_bytes()
    repack(tmp_path / "z", tmp_path / "narrow", max_bits=2, compress=True)
    write_rest(packed, tmp_path / "rest", 2)
    join(tmp_path / "narrow", tmp_path / "rest", tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "z").read_bytes()


def test_invalid_edit_is_an_error(make, packed, tmp_path):
    repack(packed, tmp_path / "narrow", max_bits=2)
    write_rest(packed, tmp_path / "rest", 4)
    with pytest.raises(UserError, match="does not start at plane 2"):
        join(tmp_path / "narrow", tmp_path / "rest", tmp_path / "x")
    with pytest.raises(UserError, match="is not a rest file"):
        join(tmp_path / "narrow", packed, tmp_path / "x")
    save_packed(
        make(level="left", classes=10, quantizer="round")[0], tmp_path / "other", max_bits=4
    )
    with pytest.raises(UserError, match="another model"):
        join(tmp_path / "other", tmp_path / "rest", tmp_path / "x")
    with pytest.raises(UserError, match="rest file"):
        load_packed(tmp_path / "rest")
    with pytest.raises(UserError, match="has no rest above 8"):
        write_rest(packed, tmp_path / "x", 8)
    with pytest.raises(UserError, match="stores 8 planes"):
        repack(packed, tmp_path / "x", max_bits=9)
    header, tensors = read_all(packed)
    write_container(tmp_path / "short", {**tensors, "plane3": tensors["plane3"][1:]}, header)
    with pytest.raises(UserError, match="plane3 does not have"):
        repack(tmp_path / "short", tmp_path / "x", compress=True)
    with Container(tmp_path / "rest") as file:
        rest = {name: file.read(name)[name].copy() for name in file.sections}
        write_container(tmp_path / "short", {**rest, "plane5": rest["plane5"][1:]}, file.header)
        write_container(tmp_path / "bad", rest, {**file.header, "stored_bits": "8"})
    repack(packed, tmp_path / "narrow", max_bits=4)
    for name, match in (("short", "plane5 does not have"), ("bad", "no valid 'stored_bits'")):
        with pytest.raises(UserError, match=match):
            join(tmp_path / "narrow", tmp_path / name, tmp_path / "x")
    assert not (tmp_path / "x").exists()
