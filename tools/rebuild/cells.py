"""Where cells go that export nothing, if not with the definition beside them: {old notebook: {cell number: module or lesson}}.

By default a text goes with the next definition, an example with the one before it. Numbers as at COMMIT.
"""


def spread(**ranges: str) -> dict[int, str]:
    found = {}
    for name, text in ranges.items():
        for part in text.split():
            first, _, last = part.partition("-")
            found |= {i: name.replace("__", ".") for i in range(int(first), int(last or first) + 1)}
    return found


CELLS = {
    "00_core": spread(
        start="3 4 19-23 109",
        engine__files="49",
        engine__models="61 62",
        engine__hub="67 68",
        engine__loader="90 91",
        engine__trainer="69-72 99-102",
    ),
    "01_data": spread(
        data__scenes="5 12 15 16 24 25 28-32 35-46 98",
        data__folders="47-49 64 66 67",
        data__sets="68",
        data__keys="76-81",
        data__datasets="72 73 93 94 95 97",
    ),
    "01b_sources": spread(
        data__sources="5-7 10",
        data__tar="26-28",
        data__reading="36 38-40 44-46 51-58",
        data__streams="59 70-72",
        data__set_sources="61",
        data__opening="73 82 83",
    ),
    "02_features": spread(data__extractors="25-30", data__features="31-33 47-59"),
    "10_evaluate": spread(
        evaluation__metrics="3 37 45 56-59 61-65 73-82",
        evaluation__report="34 36 42",
        engine__marks="39 41",
        evaluation__evaluate="49 51 54",
        evaluation__compare="66-70",
    ),
    "11_train": spread(
        training="3 7-9 44-47 64-74",
        engine__checkpoint="11 13 14 23 25 27",
        engine__claims="15 17 19 21 22",
        engine__monitor="28 30 31 33",
        engine__distributed="43",
        engine__resume="48-54",
        engine__long_run="56-62",
    ),
    "11b_cache": spread(
        io__build="3 7-14 18 30-40 41 43 45 47 50 60 62-86",
        io__pictures="15 16 26 28 29",
        engine__shards="19 21 23 24",
        io__cache="51-58",
    ),
    "13_released": spread(
        released="3 7-10 16 17 33 48-53 59-71",
        io__grammar="11 14 18",
        io__tables="20 22",
        io__layout="23-31",
        io__released="34-47",
        io__export="54 57",
    ),
    "15_pipeline": spread(
        apps__run="3 5 6 44 47-59",
        apps__run_config="9 16 18 19",
        apps__pictures="12 14",
        apps__pace="20-26",
        apps__page="27-32",
        apps__stages="34 39 41",
        apps__job="37",
    ),
    "15b_commands": spread(
        apps__cli="14 16 18 20",
        apps__options="8 9 10 13",
        apps__models="22 24",
        apps__training="26 28",
        apps__train="31 33 35",
        apps__tokenize="37 39 41 43",
        apps__generate="46 49",
        apps__measure="51",
        apps__estimate="53 55 57",
        apps__run="59",
        session="3 5 61-80",
    ),
    "16_cost": spread(
        apps__cost="3 7-29",
        apps__timing="30 32 34",
        apps__bench_training="38 40 43-45",
        apps__bench="47-49 51",
    ),
    "17_zoo": spread(apps__zoo="3 7-24 30-34", apps__card="25 28", apps__explore="35-65"),
}
