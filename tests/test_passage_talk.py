"""A question that knows its passages is no question of its own; one that only sounds like it is."""

from __future__ import annotations

import pytest

from raglan.verification.talk import passage_talk

TALKS = """
According to the passage, when was it opened?
In the above passage, who is the builder?
What does the passage say of it?
As stated in the article, who built the mill?
According to the information provided, who built it?
What does the passage say about mills?
From the text, who owned the mill?
Who, from the text, owned the mill?
Based on the provided context, who built it?
Based on the text, list the owners.
Who is mentioned in the passage?
In the text above, what burnt?
What burnt, according to this document?
What is the date given in the text below?
In this passage, who is Odo?
The passage mentions a mill; where is it?
Which owners are named in the given excerpt?
What, as described in the document, happened next?
Using only the context provided, name the owner.
What does report_2020.pdf say of the observatory?
According to notes.md, who built it?
Who is the owner in deed.pdf?
Based on the passages, what is the year?
Per the article, who built it?
What do the documents say about Odo?
根据上文，青浦大桥哪一年通车？
依据上文，大桥何时通车？
根據上文，大橋何時通車？
根据所给材料，大桥何时通车？
文章中大桥何时通车？
上述材料中提到的大桥何时通车？
根据以下内容，说明大桥何时通车。
该文档说明大桥何时通车？
本文的主要观点是什么？
在上文中已废除的法律是什么？
根据文中信息，谁建了桥？
依據所給資料，誰建了橋？
这篇文章讲了什么？
这段文字说明了什么？
文中提到的大桥在哪里？
请根据材料，回答谁建了桥。
结合材料内容，谈谈大桥的作用。
在文章里，谁是主角？
根据report.pdf，谁建了桥？
年报.docx中提到了谁？
根据段落，谁建了桥？
据上文所述，谁建了桥？
""".strip().splitlines()
STANDS = """
In the passage of the Suez Canal, which lake is crossed first?
How do I read data.csv with pandas?
What does robots.txt do?
Which text is the oldest in the library of the observatory?
How long is the passage to India?
Who wrote the article of faith of 1536?
In the context of the Cold War, what is containment?
What did the text of the treaty of 1801 say about fishing?
According to the document of 1215, who may be tried?
How do I count the rows in data.csv?
How is a word written bold in the text editor Vim?
What is a passage grave?
Which article of the constitution protects speech?
Who owned the passage through the mountains?
What information does a passport hold?
How do I write setup.py and README.md?
Which contextual clues help readers?
What rights does the law grant in the article 5 procedure?
How do I open report.pdf in a browser?
Correct the following text: the mill burnt in 1810.
In the document management system Alfresco, what is a site?
日本文化的特点是什么？
日本文学的代表作有哪些？
这个项目的基本文件有哪些？
软件的版本文件在哪里？
资本文明的批评者是谁？
历史上文化最繁荣的朝代是哪个？
复合材料中碳纤维的作用是什么？
根据材料力学，梁的弯矩如何计算？
以上海为例，说明城市的发展。
请改正以下内容：磨坊毁于1810年。
鲁迅的文章中哪一篇最有名？
隋代历史上文中子是谁？
网上文章的著作权归谁？
上文件柜的锁怎么开？
如何用pandas读取data.csv？
身上文身的含义是什么？
根据文献记载，谁建了桥？
古代文中的“之”有哪些用法？
样本文件怎么打开？
剧本文稿由谁撰写？
根据材料的强度，选择哪种钢？
""".strip().splitlines()


@pytest.mark.parametrize("query", TALKS)
def test_it_talks_of_its_passages(query: str) -> None:
    assert passage_talk(query)


@pytest.mark.parametrize("query", STANDS)
def test_it_stands_by_itself(query: str) -> None:
    assert passage_talk(query) == ""
