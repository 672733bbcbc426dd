"""Where subjects are in the first frame of the real clips: drawn by hand, in pixels of the clip.

Left, top, right, bottom, for what the captions name and the first frame shows; `alignlab data
masks` makes masks of them. Things that are thin and cut up, such as a bicycle behind a railing, are
left out.
"""

Box = tuple[int, int, int, int]

BOXES: dict[str, dict[str, Box]] = {
    "bunny-1": {"a big gray rabbit": (70, 90, 173, 198), "gray boulders": (6, 86, 72, 188)},
    "bunny-2": {"a big gray rabbit": (42, 66, 188, 198), "gray boulders": (8, 88, 68, 188)},
    "bunny-3": {"a big gray rabbit": (43, 60, 214, 212), "gray boulders": (8, 90, 66, 188)},
    "bunny-4": {"a big gray rabbit": (58, 12, 223, 248), "gray boulders": (0, 108, 70, 224)},
    "bunny-5": {"a big gray rabbit": (42, 26, 205, 224), "gray boulders": (18, 102, 86, 204)},
    "bunny-6": {"a big gray rabbit": (36, 28, 210, 250), "gray boulders": (4, 126, 74, 226)},
    "carphone-1": {"a man in a dark suit": (22, 12, 144, 144), "a red bow tie": (77, 98, 126, 120)},
    "carphone-2": {
        "a man in a dark suit": (33, 12, 144, 144),
        "a blue striped window shade": (0, 45, 67, 112),
    },
    "carphone-3": {"a man in a dark suit": (15, 13, 144, 144), "a red bow tie": (72, 97, 118, 118)},
    "carphone-4": {
        "a man in a dark suit": (18, 6, 144, 144),
        "a blue striped window shade": (0, 45, 62, 112),
    },
    "carphone-5": {"a man in a dark suit": (13, 12, 144, 144), "a red bow tie": (68, 96, 120, 117)},
    "bus": {"the white roof of a bus": (0, 0, 90, 256)},
    "suit": {"a man in a black suit": (0, 0, 110, 256), "a silver car": (96, 14, 256, 256)},
    "taxi": {"a car roof": (0, 144, 131, 256)},
    "cyclist-1": {
        "a cyclist with a helmet": (106, 42, 244, 216),
        "a glowing orange sign": (10, 77, 68, 123),
    },
    "cyclist-2": {
        "a cyclist with a helmet": (2, 17, 136, 256),
        "a parked motorcycle": (170, 139, 256, 256),
    },
    "van": {"a gray van": (0, 62, 238, 256), "a glowing orange sign": (196, 75, 254, 120)},
    "railing-1": {"a black car": (0, 72, 190, 208)},
    "railing-2": {"a black car": (0, 90, 112, 170), "a green estate car": (192, 97, 256, 154)},
    "railing-3": {"a white car": (0, 80, 110, 172)},
    "pavement-1": {
        "a pedestrian in dark trousers": (0, 0, 136, 238),
        "a green bollard": (98, 94, 158, 256),
    },
    "pavement-2": {
        "a green bollard": (34, 93, 100, 256),
        "an old black bicycle": (98, 10, 256, 198),
    },
}
