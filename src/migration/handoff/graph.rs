//! The tables drawn into `docs/handover.md`, so that the document cannot differ from what the engine does.

use std::collections::BTreeMap;
use std::fmt::{Debug, Write};

use super::source::SOURCE_TABLE;
use super::target::TARGET_TABLE;
use super::{Row, Then};

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/handover.md");

/// Everything after this line is drawn.
const MARKER: &str =
    "<!-- From here on drawn from the tables: MIGRATE_WRITE_DOCS=1 cargo test --lib handover -->\n";

#[test]
fn the_document_shows_the_handover_as_the_tables_have_it() {
    let document = std::fs::read_to_string(DOCUMENT).expect("docs/handover.md is readable");
    let (prose, drawn) = document
        .split_once(MARKER)
        .expect("docs/handover.md has the line before the drawn part");
    if std::env::var_os("MIGRATE_WRITE_DOCS").is_some() {
        let whole = format!("{prose}{MARKER}{}", handover_graph());
        std::fs::write(DOCUMENT, whole).expect("docs/handover.md is writable");
        return;
    }
    assert!(
        drawn == handover_graph(),
        "docs/handover.md is out of date; its marker line says how to draw it again"
    );
}

/// Both tables as Mermaid state diagrams and as tables, in Markdown.
fn handover_graph() -> String {
    let mut text = String::new();
    draw(&mut text, "Source", "Copying", SOURCE_TABLE);
    text.push('\n');
    draw(&mut text, "Target", "Receiving", TARGET_TABLE);
    text
}

fn draw<S: Debug, E: Debug, A: Debug>(
    text: &mut String,
    name: &str,
    first: &str,
    table: &[Row<S, E, A>],
) {
    // Events that lead the same way with the same actions share one arrow; writing to a String cannot fail.
    let mut arrows: BTreeMap<(String, String, String), Vec<String>> = BTreeMap::new();
    for row in table {
        let Then::Go(to, actions) = &row.then else {
            continue;
        };
        for from in row.from {
            let key = (format!("{from:?}"), format!("{to:?}"), listed(actions));
            arrows
                .entry(key)
                .or_default()
                .extend(row.on.iter().map(|event| format!("{event:?}")));
        }
    }
    let _ = writeln!(
        text,
        "### {name}\n\n```mermaid\nstateDiagram-v2\n    [*] --> {first}"
    );
    for (from, to) in arrows
        .keys()
        .map(|(from, to, _)| (from, to))
        .collect::<std::collections::BTreeSet<_>>()
    {
        let _ = writeln!(text, "    {from} --> {to}");
    }
    let _ = writeln!(
        text,
        "```\n\n| from | on | to | actions, in order |\n|---|---|---|---|"
    );
    for ((from, to, actions), events) in &arrows {
        let _ = writeln!(
            text,
            "| {from} | {} | {to} | {actions} |",
            events.join(", ")
        );
    }
    let _ = writeln!(text, "\n| ignored in | on | because |\n|---|---|---|");
    for row in table {
        if let Then::Ignore(why) = &row.then {
            let _ = writeln!(
                text,
                "| {} | {} | {why} |",
                listed(row.from),
                listed(row.on)
            );
        }
    }
}

fn listed<T: Debug>(items: &[T]) -> String {
    items
        .iter()
        .map(|item| format!("{item:?}"))
        .collect::<Vec<_>>()
        .join(", ")
}
