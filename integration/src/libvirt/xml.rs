//! Small helpers over `roxmltree`: find, escape, compare, and edit by byte ranges.
//!
//! A domain definition holds much that this project does not know. It is therefore never written anew from a parsed
//! tree: edits are splices into the text, and everything outside the spliced ranges stays byte for byte as it was.

use std::ops::Range;

use roxmltree::{Document, Node};

use super::error::PlanError;

pub(super) fn parse(xml: &str) -> Result<Document<'_>, PlanError> {
    Document::parse(xml).map_err(|e| PlanError::BadXml { reason: e.to_string() })
}

/// Whether `node` is the element `name` in no namespace, as all of libvirt's own elements are.
pub(super) fn is(node: Node<'_, '_>, name: &str) -> bool {
    node.is_element() && node.tag_name().name() == name && node.tag_name().namespace().is_none()
}

/// The first child element `name`.
pub(super) fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|n| is(*n, name))
}

/// The attribute `attribute` of the first child element `name`.
pub(super) fn child_attribute<'a>(node: Node<'a, '_>, name: &str, attribute: &str) -> Option<&'a str> {
    child(node, name).and_then(|n| n.attribute(attribute))
}

/// The text of the first child element `name`, trimmed.
pub(super) fn child_text<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    child(node, name).and_then(|n| n.text()).map(str::trim)
}

/// Text content such that a parser gives back exactly `text`. A bare carriage return would come back as a line feed.
pub(super) fn escape_text(text: &str) -> String {
    escape(text, false)
}

/// An attribute value for either kind of quote. A parser turns bare white space in attributes into blanks.
pub(super) fn escape_attribute(text: &str) -> String {
    escape(text, true)
}

fn escape(text: &str, attribute: bool) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 8);
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\r' => out.push_str("&#13;"),
            '\'' if attribute => out.push_str("&apos;"),
            '"' if attribute => out.push_str("&quot;"),
            '\n' if attribute => out.push_str("&#10;"),
            '\t' if attribute => out.push_str("&#9;"),
            c => out.push(c),
        }
    }
    out
}

/// Replacements of byte ranges of one text.
#[derive(Debug, Default)]
pub(super) struct Splices(Vec<(Range<usize>, String)>);

impl Splices {
    pub(super) fn replace(&mut self, range: Range<usize>, with: String) {
        self.0.push((range, with));
    }

    pub(super) fn insert(&mut self, at: usize, text: String) {
        self.0.push((at..at, text));
    }

    /// Removes an element with the white space before it, which undoes an insertion of "line break, indent, element".
    pub(super) fn remove_with_indent(&mut self, xml: &str, range: Range<usize>) {
        let start = xml[..range.start].trim_end_matches([' ', '\t', '\n', '\r']).len();
        self.0.push((start..range.end, String::new()));
    }

    /// The text with all splices applied. Ranges must not overlap; insertions at one place keep their order.
    pub(super) fn apply(mut self, xml: &str) -> String {
        self.0.sort_by_key(|(range, _)| (range.start, range.end));
        let mut out = String::with_capacity(xml.len() + 512);
        let mut at = 0;
        for (range, text) in self.0 {
            debug_assert!(at <= range.start, "overlapping splices");
            out.push_str(&xml[at..range.start]);
            out.push_str(&text);
            at = range.end;
        }
        out.push_str(&xml[at..]);
        out
    }
}

/// The white space between the start of the line and `at`, or nothing where other text stands before it.
pub(super) fn indent_of(xml: &str, at: usize) -> &str {
    let line = xml[..at].rfind('\n').map_or(0, |i| i + 1);
    let indent = &xml[line..at];
    if indent.bytes().all(|b| b == b' ' || b == b'\t') { indent } else { "" }
}

/// The byte range inside an element, between its start and its end tag; `None` for `<empty/>`.
pub(super) fn inner_range(xml: &str, node: Node<'_, '_>) -> Option<Range<usize>> {
    let range = node.range();
    let text = &xml[range.clone()];
    if text.ends_with("/>") {
        return None;
    }
    let end = range.start + text.rfind("</")?;
    // With children, the content starts with the first one. Without, the start tag's `>` is the one before `</`.
    let start = node.first_child().map_or(end, |first| first.range().start);
    Some(start..end)
}

/// An element in a canonical spelling: attributes and child elements sorted, white space around text dropped, comments
/// left out. Two spellings of which libvirt makes the same device have the same canonical text.
pub(super) fn canonical(node: Node<'_, '_>) -> String {
    let mut attributes: Vec<String> =
        node.attributes().map(|a| format!("{}=\"{}\"", a.name(), escape_attribute(a.value()))).collect();
    attributes.sort();
    let mut children: Vec<String> = node.children().filter(Node::is_element).map(canonical).collect();
    children.sort();
    let text: String = node.children().filter(Node::is_text).filter_map(|n| n.text()).map(str::trim).collect();
    let name = node.tag_name();
    let namespace = name.namespace().unwrap_or_default();
    format!("<{{{namespace}}}{} {}>{}{}</>", name.name(), attributes.join(" "), escape_text(&text), children.concat())
}

/// Whether two XML texts, each one element, say the same.
pub(super) fn same(a: &str, b: &str) -> bool {
    match (Document::parse(a), Document::parse(b)) {
        (Ok(a), Ok(b)) => canonical(a.root_element()) == canonical(b.root_element()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn splices_apply_in_order_and_leave_the_rest() {
        let mut splices = Splices::default();
        splices.replace(6..9, "TWO".into());
        splices.insert(3, "+".into());
        splices.insert(3, "-".into());
        assert_eq!(splices.apply("one . two."), "one+- . TWO.");
    }

    #[test]
    fn removal_undoes_an_insertion_with_indent() {
        let xml = "<a>\n  <b/>\n</a>";
        let mut insert = Splices::default();
        insert.insert(10, "\n  <c/>".into());
        let longer = insert.apply(xml);
        let mut remove = Splices::default();
        let at = longer.find("<c/>").unwrap();
        remove.remove_with_indent(&longer, at..at + 4);
        assert_eq!(remove.apply(&longer), xml);
    }

    #[test]
    fn inner_range_of_empty_and_filled_elements() {
        for (xml, inner) in [
            ("<a/>", None),
            ("<a></a>", Some("")),
            ("<a x='>'></a>", Some("")),
            ("<a> <b/> </a>", Some(" <b/> ")),
            ("<a x='1'>t</a>", Some("t")),
        ] {
            let doc = Document::parse(xml).unwrap();
            assert_eq!(inner_range(xml, doc.root_element()).map(|r| &xml[r]), inner, "{xml}");
        }
    }

    #[test]
    fn comparison_ignores_order_and_white_space_but_nothing_else() {
        assert!(same("<d a='1' b='2'><x/><y>t</y></d>", "<d b=\"2\" a='1'>\n <y> t </y><x></x>\n</d>"));
        assert!(!same("<d a='1'/>", "<d a='2'/>"));
        assert!(!same("<d><x/></d>", "<d><x/><x/></d>"));
        assert!(!same("<d>t</d>", "<d/>"));
    }

    proptest! {
        #[test]
        fn escaped_text_and_attributes_come_back_exactly(text in "[\\t\\n\\r -~äß€]{0,40}") {
            let xml = format!("<e a='{}' b=\"{}\">{}</e>", escape_attribute(&text), escape_attribute(&text), escape_text(&text));
            let doc = Document::parse(&xml).unwrap();
            let root = doc.root_element();
            prop_assert_eq!(root.attribute("a"), Some(text.as_str()));
            prop_assert_eq!(root.attribute("b"), Some(text.as_str()));
            prop_assert_eq!(root.text().unwrap_or_default(), text.as_str());
        }
    }
}
