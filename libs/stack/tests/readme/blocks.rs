//! The blocks of README.md and docs/operations.md: indented by four spaces, or fenced.

use crate::overlay::ROOT;
use anyhow::{Context, Result, ensure};
use tokio::process::Command;

const DOCUMENTS: [&str; 2] = ["README.md", "docs/operations.md"];

/// Every block of both documents, without its indentation or fence.
pub fn blocks() -> Result<Vec<String>> {
    let mut blocks = Vec::new();
    for document in DOCUMENTS {
        let text = std::fs::read_to_string(format!("{ROOT}/{document}")).with_context(|| document.to_owned())?;
        let found = blocks_of(&text)?;
        ensure!(found.len() > 5, "{document} has the blocks {found:#?}");
        blocks.extend(found);
    }
    Ok(blocks)
}

fn blocks_of(text: &str) -> Result<Vec<String>> {
    let mut blocks: Vec<String> = Vec::new();
    let (mut fenced, mut inside) = (false, false);
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            (fenced, inside) = (!fenced, false);
            continue;
        }
        let code = if fenced { Some(line) } else { line.strip_prefix("    ") };
        match code.or((inside && line.is_empty()).then_some("")) {
            Some(code) => {
                if !inside {
                    blocks.push(String::new());
                }
                let block = blocks.last_mut().context("a block has begun")?;
                *block = format!("{block}{code}\n");
                inside = true;
            }
            None => inside = false,
        }
    }
    Ok(blocks.iter().map(|block| block.trim_end().to_owned()).collect())
}

/// The only block that contains `part`.
pub fn block(part: &str) -> Result<String> {
    let mut blocks = blocks()?;
    blocks.retain(|block| block.contains(part));
    ensure!(blocks.len() == 1, "{} blocks of {DOCUMENTS:?} contain {part:?}", blocks.len());
    blocks.pop().context("there is one")
}

/// Runs a command and returns its output. Fails if the command fails.
pub async fn outcome(command: &mut Command) -> Result<String> {
    let output = command.kill_on_drop(true).output().await.with_context(|| format!("cannot run {command:?}"))?;
    let (printed, complaints) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {printed}\n{complaints}", output.status);
    Ok(printed)
}
