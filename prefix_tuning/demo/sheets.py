"""Made-up sheets, and questions about them: what mini-reader reads, and what the study distils into prefixes.

A sheet says things about people who do not exist, one statement a line:

    王芳的城市是昆明。
    在职业一栏，李强写的是厨师。

A question about it has the format of the rows that train.py reads:

    Human: 李强的职业是什么？

    Assistant: 厨师

All names and values are drawn anew for each sheet, so nothing about a sheet can be learnt by heart. Without the sheet, an
answer is a guess among the 24 values of a column.
"""

# ruff: noqa: E501  an ideograph is two columns wide
import json
import random
from collections.abc import Sequence
from pathlib import Path

NAMES = [surname + given for surname in "王李张刘陈杨黄赵周吴徐孙胡朱林何" for given in "伟芳娜敏静丽强磊军洋勇艳"]
COLUMNS = {
    column: values.split()
    for column, values in {
        "城市": "北京 上海 广州 深圳 天津 重庆 成都 武汉 西安 南京 杭州 苏州 青岛 大连 厦门 长沙 郑州 昆明 福州 合肥 济南 宁波 无锡 桂林",
        "职业": "医生 教师 律师 厨师 司机 记者 护士 会计 警察 农民 画家 歌手 演员 导游 编辑 翻译 木匠 裁缝 船长 园丁 邮差 法官 矿工 店员",
        "爱好": "钓鱼 下棋 爬山 游泳 跑步 唱歌 跳舞 摄影 绘画 书法 集邮 阅读 烹饪 园艺 骑车 射箭 滑冰 打猎 剪纸 木工 编织 露营 品茶 观鸟",
        "水果": "苹果 香蕉 葡萄 西瓜 草莓 樱桃 芒果 荔枝 菠萝 柠檬 橙子 桃子 李子 杏子 柿子 石榴 椰子 龙眼 木瓜 山竹 杨梅 枇杷 红枣 甜瓜",
        "动物": "老虎 狮子 大象 熊猫 猴子 兔子 狐狸 松鼠 骆驼 袋鼠 海豚 鲸鱼 企鹅 孔雀 鹦鹉 乌龟 青蛙 蝴蝶 蜜蜂 蚂蚁 刺猬 山羊 水牛 野猪",
        "乐器": "钢琴 古筝 二胡 琵琶 笛子 唢呐 吉他 提琴 口琴 竖琴 长号 圆号 短笛 木琴 铜锣 腰鼓 手鼓 月琴 扬琴 葫芦 风琴 三弦 编钟 洞箫",
        "颜色": "红色 黄色 蓝色 绿色 白色 黑色 紫色 橙色 灰色 棕色 粉色 金色 银色 青色 米色 褐色 墨色 茶色 玫色 杏色 藕色 靛色 赭色 麦色",
        "早餐": "豆浆 油条 包子 馒头 稀饭 面条 馄饨 煎饼 烧饼 花卷 鸡蛋 牛奶 面包 米粉 汤圆 春卷 蒸饺 肉粽 麻团 豆腐 年糕 锅贴 酸奶 麦片",
    }.items()
}
STATEMENTS = ("{n}的{c}是{v}。\n", "在{c}一栏，{n}写的是{v}。\n", "据记录，{n}的{c}为{v}。\n")
QUESTIONS = ("{n}的{c}是什么？", "请问在{c}一栏，{n}写的是什么？", "我想知道{n}的{c}。")
MOST = 40  # statements of a sheet

Pair = tuple[str, str]  # name and column
Facts = dict[Pair, str]  # their values


def draw_facts(rng: random.Random, count: int, most_columns: int = len(COLUMNS), names: Sequence[str] = NAMES) -> Facts:
    """`count` facts about some columns of several people. Values repeat. With more than one column, only name and column
    together tell a fact.
    """
    columns = rng.sample(list(COLUMNS), rng.randint(1, most_columns))
    people = rng.sample(names, -(-count // len(columns)) + rng.randint(0, 4))
    pairs = rng.sample([(name, column) for name in people for column in columns], count)
    return {(name, column): rng.choice(COLUMNS[column]) for name, column in pairs}


def sheet_of(rng: random.Random, facts: Facts, forms: Sequence[str] = STATEMENTS) -> str:
    return "".join(rng.choice(forms).format(n=name, c=column, v=value) for (name, column), value in facts.items())


def questions_about(rng: random.Random, facts: Facts) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows that ask about all facts, in random order. Each fact is asked in two forms, and held out in the third."""
    rows: tuple[list[dict[str, str]], list[dict[str, str]]] = [], []
    for (name, column), value in facts.items():
        held_out = rng.choice(QUESTIONS)
        for form in QUESTIONS:
            row = {"instruction": form.format(n=name, c=column), "input": "", "output": value}
            rows[form == held_out].append(row)
    for some in rows:
        rng.shuffle(some)
    return rows


def write_sheet(seed: int, folder: Path) -> None:
    """A sheet of 40 statements, and questions about it."""
    rng = random.Random(seed)
    facts = draw_facts(rng, MOST)
    (folder / "sheet.txt").write_text(sheet_of(rng, facts), "utf-8")
    for file, rows in zip(("sheet", "sheet-eval"), questions_about(rng, facts), strict=True):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{file}.jsonl").write_text("".join(lines), "utf-8")
