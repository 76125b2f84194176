"""Every number by which the solver can be tuned. None of them can make an answer wrong.

They decide how long the solver tries what, and when it stops: a bad value costs time, or leaves a gap that the answer
states. Numbers on which correctness rests stay where they are used: `problem.TOLERANCE` (what counts as equal), the
margins for rounding in `proof/`, the tolerance of ties in `pool.py`.

Modules read `tuning.NAME` when they need it, so a test may set one. Each docstring says what the number trades, and how
it was chosen, as far as that is on record. Where it says nothing of that, the number is a default: no measurement is on
record. "Insensitive" tells of trials with half and with double of a number, on networks of `benchmarks/planner.py`
(Llama-3-8B without layers on three axes; Llama-3-405B with 32 layers on two axes, with and without a capacity): costs
and gaps were the same, and sweeps read as many entries, to 10 %.

Words: the *gap* is what a choice costs beyond the bound; a *round* is 3 sweeps (`bounds/extrapolate.py`).
"""

# -- The whole solve (solve.py) ----------------------------------------------------------------------------------------

TIME_LIMIT = 20.0
"""CPU-seconds for one solve, after which its best choice so far is taken. Time against gap."""

FOLD_FACTOR = 2
"""Times that a network must shrink for folding to be used. Time of carrying a proof over against variables saved.
Costs and gaps stay the same with half and double."""

STEP_TIME_SHARE = 0.6
"""Part of the time left that a step may take which others follow: the rest is for proving what it finds."""

ENDS_TOLERANCE_SHARE = 0.5
"""Part of the tolerance that the first and last layers may leave open; the ring in the middle may leave the rest.
Costs and gaps stay the same with half and double."""

TURN_SWEEPS, TURN_HELPS = 6, 0.5
"""Sweeps over all values between two searches among few of them, where a gap is allowed and messages are known to start
from; twice as many without. And the part of the gap that a turn of both may leave to be followed by another. Time
against quality."""

LARGE_NETWORK = 8000
"""Variables beyond which a gap that folding leaves stays open: the search over all layers would take long.
Costs and gaps stay the same with half and double."""

SHORT_SWEEP_ENTRIES = 5e8
"""Entries of all tables up to which a sweep takes less than seconds, so that gaps are closed by sweeping."""

# -- Exact rewrites (exact/presolve.py, pool.py) -----------------------------------------------------------------------

PRODUCT_ENTRIES = 2**25
"""Largest `d_i * d_k * d_j` of a contraction. Time of one min-plus product against variables that go.
Costs and gaps stay the same with half and double."""

DOMINANCE_ENTRIES = 2**21
"""Largest `d_v * d_v * d_u` of a dominance test: memory (16 MB at float64) against values deleted. Costs
and gaps stay the same with half and double."""

# -- Variable elimination (exact/eliminate.py, exact/restricted_search.py) ---------------------------------------------

FACTOR_ENTRIES = 2.0**22
"""Entries of the largest factor that elimination may make (32 MB). Memory against networks that close exactly. Costs
and gaps stay the same with half and double."""

WORK_ENTRIES = 2.0**26
"""Entries of all factors that elimination may make: time against networks that close exactly. Costs
and gaps stay the same with half and double."""

IMMEDIATE_WORK = 2.0**20
"""Entries of all factors up to which elimination is tried before any sweep: it takes milliseconds then. Costs
and gaps stay the same with half and double."""

TWO_ORDERS = 10_000
"""Variables from which on one elimination order must do: the second takes longer to find than it saves. Costs
and gaps stay the same with half and double."""

RESTRICTED_HALVINGS = 40
"""Thresholds that a restricted search tries, each half of the last. The last is 1e-12 of the gap: ties.
Costs and gaps stay the same with half and double."""

RESTRICTED_VALUES = 16
"""Values a variable, on average, of which no order of elimination was ever narrow: looking for one is saved. It
was 32 at first."""

# -- Sweeps (bounds/) --------------------------------------------------------------------------------------------------

COMPILED_EDGES = 1000
"""Edges from which on sweeps run in compiled code. Loading that takes half a second; smaller networks finish sooner.
A sweep over Llama-3-405B's template on three axes took 175 ms in numpy, and 42 ms compiled."""

ENTRIES_PER_EDGE = 20_000
"""Table entries that count as one edge more in `COMPILED_EDGES`: numpy is slow by the edge, as fast by the entry."""

REPEATED_ENTRIES = 2048
"""Entries of a table from which on looking for equal rows and columns pays."""

EXTRAPOLATION_GROWTH, EXTRAPOLATION_SHRINK = 2.0, 0.25
"""Factors of the next extrapolation's length after one that helped, and one that did not. Half and double
change the entries read by 12 % at most."""

EXTRAPOLATION_LEAST, EXTRAPOLATION_MOST = 1.0, 64.0
"""The shortest and the longest extrapolation, in changes of a sweep. A shortest of 0.5 made sweeps read 1.5 times the
entries in one network, one of 2 twice; the longest is insensitive."""

# -- Triplets (bounds/triplets.py) -------------------------------------------------------------------------------------

GROUPS = 48
"""Groups of a variable's values that a triplet tells apart. A triplet holds `GROUPS ** 3` entries: time and memory
(0.9 MB) against the bound. Insensitive."""

MAX_TRIPLETS = 400
"""Triplets that one round adds: time of a sweep against rounds needed. Insensitive."""

JOINS = 3
"""Ways to join two variables of a cycle that are looked at: those that charge most pairs of values. Time against
cycles seen; before there was a limit, looking at all of them broke the time limit. Insensitive."""

LOAN_CEILING = 2.0
"""Times the gap above the least of a table where its entries are cut off before triplets borrow. Above 1 it cuts
nothing that a better choice could have; twice that leaves room for the bound to rise. Insensitive."""

TRIPLET_GAIN = 1e-4
"""Part of the gap that a triplet must promise to close to be added. Insensitive."""

# -- Search (exact/search.py, exact/forest.py, exact/active.py) --------------------------------------------------------

SEARCH_SWEEPS = 400
"""Sweeps of a search between two attempts at something else. Insensitive."""

LOOK_EVERY = 2
"""Rounds of sweeps between two looks for a choice. A look takes less than a sweep. It was 5 before sweeps extrapolated.
With 1, sweeps read 1.15 and 0.76 times the entries in two networks; with 4, 1.11 and 1.36 times."""

SEARCH_STALLED, SEARCH_STALLED_TRIPLETS = 2e-2, 1e-3
"""Gain between two looks, as a part of the gap, below which a bound has stalled: over pairs alone, where triplets come
next; with triplets, where only branching does. Insensitive."""

PRUNE_AGAIN = 0.5
"""Part of the gap at the last pruning from which on it is done again. Insensitive."""

SEARCH_TRIPLET_ROUNDS, SEARCH_TRIPLETS_HELP = 20, 0.02
"""Rounds of triplets in a search, and the part of the gap that one must close to be followed by another.
The rounds are insensitive."""

BRANCHED_PAIRS = 2e6
"""Pairs of values beyond which branching is not tried: HiGHS gets nowhere there in minutes."""

MILP_UNITS = 1e3
"""The gap, or the cost, in the units given to HiGHS, which stops at absolute gaps of 1e-6."""

FORESTS = 16
"""Forests that one descent tries at most. Half and double changed nothing for Llama-3-405B within a capacity."""

FOREST_PATIENCE, FOREST_GAIN = 3, 1e-3
"""Forests in a row that gain little, after which a descent ends; and what is little, as a part of all it gained.
Half and double of the first, and half of the second, changed nothing for Llama-3-405B within a capacity."""

# -- Proofs (proof/) ---------------------------------------------------------------------------------------------------

PROOF_SWEEPS = 200
"""Sweeps of a proof between two rounds of triplets."""

PROOF_STALLED = 2e-2
"""Gain between two looks, as a part of the gap, below which the bound of a proof has stalled."""

PROOF_STALLED_SEARCHING = 1e-1
"""The same over pairs alone while the best choice is not known: a search finds that sooner."""

PROOF_TRIPLET_ROUNDS, PROOF_TRIPLETS_HELP = 12, 0.1
"""Rounds of triplets in a proof, and the part of the gap that one must close to be followed by another."""

GATHER_ABOVE = 1.0
"""Reduced cost, in gaps, up to which values are told apart. Less would gather values that the best choice may have."""

GATHER_AGAIN = 0.7
"""Part of the gap at the last gathering from which on values are gathered again."""

GATHER_GAP = 2e-2
"""Gap, as a part of the cost, in which gathering pays: in larger ones most values stay."""

GATHER_TABLE = 4096
"""Entries of an average table from which on sweeps spend their time on entries, so that gathering pays."""

GATHER_SHRINK = 0.5
"""Part of all entries that gathering may leave at most to be worth building the smaller network."""

RESTRICTED_SEARCH_AGAIN = 0.5
"""Part of the gap at the last restricted search from which on it is done again. It was 0.1 at first."""

CLOSING = 0.5
"""Part of the gap that one round must leave at most to be allowed more sweeps than asked for."""

AIM_EXACT, AIM_ROUGH = 0.1, 0.9
"""Parts of the tolerance at which a proof aims: 0.1 where it is rounding, so that the check passes by a margin; 0.9 of
a gap that the caller allows, where it was 0.7 at first."""

CHECKED_FACTOR_ENTRIES = 2.0**24
"""Entries of a factor that a check of a certificate is willing to make (128 MB)."""

# -- Repeated blocks (layers/) -----------------------------------------------------------------------------------------

MIN_LAYERS = 8
"""Layers from which on a network is folded. Time of folding against variables saved."""

PERIODS, TURNS = 160, 8
"""Distances between equal variables that are tried as the length of a layer, the most frequent first; and how many of
them together: layers may take turns (five of local attention, one of global)."""

MANY_READERS = 16
"""Edges to later variables from which on a variable counts as one that all layers may read."""

LONG_RUN = 4
"""Times shorter than the longest run that another may be to have a say in how many layers there are."""

UNFOLDED_SWEEPS = 3
"""Sweeps over all layers, beside those that any start of messages takes, where the template's proof leaves a gap. For
Qwen3-MoE-235B on two axes the start alone takes it from 6e-3 to 1e-5, in 1.1 seconds; a ring takes 2 to leave 2e-2."""

UNFOLDED_GAP = 1e-4
"""Gap, as a part of the cost, from which on exact solves sweep over all layers, too, before they search on."""

RING_COPIES = 3
"""Copies of a layer in a ring. With two, the edge to the copy before and the edge to the copy after could be one."""

# -- Within a capacity (capacity.py and what it uses) ------------------------------------------------------------------

CAPACITY_GAP, CAPACITY_GAP_FOLDED = 1e-3, 1e-3
"""Relative gaps at which the search within a capacity ends: without and with a fold. Time against
gap. They were 5e-4 at first."""

STEP_GAP, STEP_GAP_FOLDED, STEP_GAP_SHORT = 3e-4, 1e-3, 3e-4
"""Relative gaps of one solve at fixed multipliers that is to prove something: without a fold, with one, and with one
where sweeps are short. What it leaves open adds to the gap of the whole.
The second was 7e-4 at first. The third was 1e-5: it took 10 seconds more for Mixtral-8x22B, and gained 2e-4."""

DRAFT_GAP, DRAFT_GAP_UNFIT = 1e-3, 1e-2
"""Relative gaps of a draft at fixed multipliers: when some choice fits, and as long as none does."""

OPEN_SHARE, OPEN_MOST = 0.1, 5e-3
"""Multipliers that promise less than this part of the gap, or of the cost, are not asked."""

PROOF_INSTEAD = 2.0
"""Times the final gap that better multipliers may promise where, with a fold, a proof is made instead of a draft: it
finds what the draft would."""

MERGE_PROMISE = 1e-2
"""What multipliers may still gain, as a part of the cost, from when on choices are merged after every step."""

PROOFS, DRAFTS = 3, 40
"""Times that a series of drafts is followed by a proof; drafts in a series."""

FOLD_KEPT, FOLD_KEPT_OF = 2, 12
"""Layers on either side of a fold under a capacity. With one, the last layer, which nothing follows, would be the only
neighbour of the cut: what it does without, all others may need of the one before. Of fewer than so many layers one is
kept: where layers take turns, each is several."""

CEILING_FIRST, CEILING_GROWTH, CEILING_LAST = 0.15, 4.0, 1e4
"""Ceilings of all multipliers until something fits: the first, the factor, the last. At 1, the whole capacity costs as
much as the whole choice. Rising ceilings keep the first answers near the useful end. It was 0.2 at first."""

HOPELESS = 3.0
"""What is proved, in multiples of the dearest known choice, from which on a capacity counts as too small."""

SPLICES = 6
"""Places at which two choices are spliced: it interpolates, so few are needed."""

MERGED_CHOICES = 4
"""Choices on either side of the capacity that are merged with each other, without a fold; with one, a
single choice on either side."""

POLISH_PARTS, POLISH_FORESTS = (0.0, 0.3, 0.6, 0.9), 8
"""Parts of the best multipliers at which the best choice is polished, and forests at each."""

BRANCHED_PAIRS_CAPACITY, BRANCHED_PAIRS_WIDE_GAP, WIDE_GAP = 20_000, 50_000, 2e-2
"""Pairs of values up to which a capacity is closed by branching; the same from a gap of `WIDE_GAP` on."""

# -- What a caller asks (passes/assign.py) -----------------------------------------------------------------------------

CAPACITY_TRIES = 4
"""Times that a caller with a measure of its own moves the capacity to where that just fits. Each takes a solve."""

CAPACITY_TRIES_CLOSE = 0.01
"""Part of the capacity that may stay unused without another try."""

FREE_DRAFT_LOAD, FREE_DRAFT_GAP = 1.5, 3e-2
"""Before the capacity is looked at, a draft without it is made to this gap. Where its peak load is this many times the
capacity, no exact solve without capacity is made: its answer would not fit. The gap was made rougher once, as the
solve only serves that test."""

NEARER_GAP = 1e-3
"""Relative gap of the plans around which strategies are offered, where there are too many of them; and what a plan must
gain for strategies to be offered around it, too. Time against quality."""

NEARER_MEMORY = 0.98
"""Part of the least peak that the least near its plan must stay below for another to be looked for."""
