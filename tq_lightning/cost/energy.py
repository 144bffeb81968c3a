"""Energy model (not a measurement) of quantized weights: an inference, and a switch of the width.

All numbers come from one table of published constants. The table and the assumptions are part of
the inspect record. Only quantized weights are counted, because norms, scales and layers in float
cost the same regardless of how the width is switched.
"""

from tq_lightning.records import Energy

# Fig. 1.1.9, "rough energy costs for various operations in 45 nm, 0.9 V". Its memory accesses are
# of 64 bits: cache of 8 KB 10 pJ, 32 KB 20 pJ, 1 MB 100 pJ, DRAM 1.3 to 2.6 nJ. The 640 pJ for 32
# bits of DRAM and 5 pJ for 32 bits of SRAM in deep-learning papers come from Han et al., arXiv
# 1506.02626, fig. 1, and agree with the 1.3 nJ and the cache of 8 KB.
SOURCE = (
    "M. Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014, fig. "
    "1.1.9: rough costs at 45 nm, 0.9 V; DRAM at the low end of 1.3 to 2.6 nJ and cache at the 1 "
    "MB entry, the most expensive one, both of which favor refetching"
)
# operation -> pJ
CONSTANTS_PJ: dict[str, float] = {
    "DRAM access, 64 bits": 1300.0,
    "SRAM access (1 MB cache), 64 bits": 100.0,
    "FP32 multiply": 3.7,
    "FP32 add": 0.9,
    "8-bit integer add": 0.03,
}
ACCESS_BITS = 64  # of the two memory constants
FLOAT_BITS = 32

ASSUMPTIONS = (
    "45 nm constants of Horowitz (ISSCC 2014, fig. 1.1.9); the bits of a 64-bit access share its "
    "energy evenly",
    "the float master is in DRAM; codes are on chip in SRAM banks of 1 MB, and so are the stored "
    "8-bit codes that are shifted in place",
    "refetch: read 32 bits per weight from DRAM, normalize and round with 2 FP32 multiplies and 2 "
    "adds (tanh, maximum and mean are not counted), write n bits to SRAM",
    "shift in place: read the stored code from SRAM, shift it at the cost of one 8-bit add, write "
    "n bits to SRAM",
    "refetch planes, if the stored codes do not fit on chip: read n bit planes from DRAM, write n "
    "bits to SRAM",
    "weight traffic: each quantized weight is read from DRAM once per inference, with 32 or n bits",
    "norms, scales, layers left in float, leakage and control logic are not counted",
)


def energy_model(weights: int, max_bits: int = 8) -> Energy:
    """Model the energy of a switch to each width, and of the weight traffic of one inference.

    Args:
        weights: number of quantized weights.
        max_bits: stored width.

    Returns:
        The energy block of the inspect record. `by_width` has refetch_float_pj, refetch_planes_pj
        and shift_pj for a switch to n bits, and traffic_float_pj and traffic_pj for an inference.
    """
    dram = CONSTANTS_PJ["DRAM access, 64 bits"] / ACCESS_BITS
    sram = CONSTANTS_PJ["SRAM access (1 MB cache), 64 bits"] / ACCESS_BITS
    requantize = 2 * CONSTANTS_PJ["FP32 multiply"] + 2 * CONSTANTS_PJ["FP32 add"]
    by_width = {}
    for bits in range(1, max_bits + 1):
        each = {
            "refetch_float_pj": FLOAT_BITS * dram + requantize + bits * sram,
            "refetch_planes_pj": bits * (dram + sram),
            "shift_pj": max_bits * sram + CONSTANTS_PJ["8-bit integer add"] + bits * sram,
            "traffic_float_pj": FLOAT_BITS * dram,
            "traffic_pj": bits * dram,
        }
        by_width[bits] = {name: weights * pj for name, pj in each.items()}
    return Energy(list(ASSUMPTIONS), dict(CONSTANTS_PJ), SOURCE, by_width)
