"""A model, no measurement, of what weights cost in energy: fetching them for an inference, and switching their width.

Every number comes from one table of published constants, each assumption is a line of words, and both go into the record
that `inspect --out` writes. Only quantized weights are counted: norms, scales and layers left in float cost the same
whichever way the width is switched.
"""

from tq_lightning.records import Energy

# Fig. 1.1.9, "rough energy costs for various operations in 45 nm, 0.9 V". Memory is given there for accesses of 64 bits:
# cache of 8 KB 10 pJ, 32 KB 20 pJ, 1 MB 100 pJ, DRAM 1.3 to 2.6 nJ. (The 640 pJ for 32 bits of DRAM and 5 pJ for 32 bits
# of SRAM that deep-learning papers print come from Han et al., arXiv 1506.02626, fig. 1, and agree with 1.3 nJ and the 8 KB.)
SOURCE = (
    "M. Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014, fig. 1.1.9: rough costs at 45 nm, "
    "0.9 V; of DRAM's 1.3 to 2.6 nJ the low end, which favours refetching; of cache the 1 MB entry, the dearest, which does too"
)
# operation -> pJ
CONSTANTS_PJ: dict[str, float] = {
    "DRAM access, 64 bits": 1300.0,
    "SRAM access (1 MB cache), 64 bits": 100.0,
    "FP32 multiply": 3.7,
    "FP32 add": 0.9,
    "8-bit integer add": 0.03,
}
ACCESS_BITS = 64  # what the two memory constants are for
FLOAT_BITS = 32

ASSUMPTIONS = (
    "45 nm constants of Horowitz (ISSCC 2014, fig. 1.1.9); energy of a 64-bit access is shared evenly by its bits",
    "the float master is in DRAM; codes live on chip in SRAM of 1 MB banks, the stored 8-bit codes for a switch by shift too",
    "refetch: read 32 bits a weight from DRAM, 2 FP32 multiplies and 2 adds to normalise and round it "
    "(tanh, the maximum and the mean are not counted), write n bits to SRAM",
    "shift in place: read the stored code from SRAM, one 8-bit add in place of the shift, write n bits to SRAM",
    "refetch planes, where the stored codes do not fit on chip: read n bit planes from DRAM, write n bits to SRAM",
    "weight traffic: each quantized weight is read from DRAM once an inference, at 32 bits or at n",
    "norm sets, scales, layers in float, leakage and the control of it all are not counted",
)


def energy_model(weights: int, max_bits: int = 8) -> Energy:
    """Energy of a switch to each width and of one inference's weight traffic at it.

    Args:
        weights: number of quantized weights.
        max_bits: stored width.

    Returns:
        The energy block of the inspect record. `by_width` holds, for a switch to n bits, refetch_float_pj,
        refetch_planes_pj and shift_pj, and for an inference traffic_float_pj and traffic_pj.
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
