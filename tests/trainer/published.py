"""What is published of the presets' models: parameters by the public logs, and layers in the order of execution."""

PLAIN = list(range(11))
TWICE = [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10]
THRICE = [0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 6, 7, 8, 9, 10]
THREE_THRICE = [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]

# Parameters less what the preset says that it has fewer, None where none are published; layers at the end of training.
FACTS = {
    "pr1326": (34_401_372, TWICE), "pr1334": (34_401_372, TWICE), "pr1296": (34_401_372, TWICE),
    "pr1285": (34_401_371, TWICE), "pr1260": (34_401_371, TWICE), "pr1218": (34_401_371, PLAIN),
    "pr1394": (35_943_512, THRICE), "pr1412": (35_943_512, THRICE), "pr1413": (35_943_512, THRICE),
    "pr1493": (35_944_536, THREE_THRICE), "pr1514": (35_944_536, THREE_THRICE),
    "pr1019": (27_067_484, PLAIN), "pr549": (26_993_756 - 512 * 128, PLAIN), "pr493": (26_829_913, PLAIN),
    "pr461": (24_634_452 - 2_048, [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9]),
    "pr1204": (30_352_046 - 4_112 - 42, TWICE), "pr1289": (None, TWICE), "pr1217": (None, PLAIN),
}  # fmt: skip
