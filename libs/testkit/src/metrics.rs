//! What a service exposes at `/metrics`.

use crate::client::Client;
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};

/// The metrics of one scrape, in the text format of Prometheus.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// As it was received.
    pub text: String,
    /// The values of the series, by name and labels.
    series: BTreeMap<String, f64>,
}

impl Metrics {
    /// Scrapes a service.
    pub async fn of(client: &Client) -> Result<Self> {
        let body = client.get("/metrics").await?.expect(200)?;
        Self::parse(body.as_str().context("metrics are text")?)
    }

    /// Reads the text format.
    pub fn parse(text: &str) -> Result<Self> {
        let mut series = BTreeMap::new();
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').with_context(|| format!("no value: {line}"))?;
            let value = value.parse().with_context(|| format!("not a number: {line}"))?;
            ensure!(series.insert(name.to_owned(), value).is_none(), "twice: {name}");
        }
        Ok(Self { text: text.to_owned(), series })
    }

    /// The sum of all series of this name that have these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|(_, value)| *value).sum()
    }

    /// Whether there is a series of this name with these labels.
    pub fn has(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        self.matching(name, labels).next().is_some()
    }

    fn matching(&self, name: &str, labels: &[(&str, &str)]) -> impl Iterator<Item = (&String, &f64)> {
        let labels: Vec<String> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        self.series.iter().filter(move |(series, _)| {
            let (begin, rest) = series.split_once('{').unwrap_or((series, ""));
            begin == name && labels.iter().all(|label| rest.contains(label.as_str()))
        })
    }

    /// Names and labels of all series.
    pub fn series(&self) -> BTreeSet<&str> {
        self.series.keys().map(String::as_str).collect()
    }

    /// The families with a type, and whether each has a help text.
    pub fn families(&self) -> BTreeMap<&str, bool> {
        let of = |comment| self.text.lines().filter_map(move |line| line.strip_prefix(comment)?.split_once(' '));
        let helped: BTreeSet<&str> = of("# HELP ").map(|(name, _)| name).collect();
        of("# TYPE ").map(|(name, _)| (name, helped.contains(name))).collect()
    }
}
