//! The whole system.

#![allow(clippy::disallowed_methods, reason = "tests look into tables, and publish what no relay would")]

mod absent_fields;
mod authority;
mod closed_nats;
mod closed_postgres;
mod encrypted_nats;
mod expiring;
mod failing_over;
mod following;
mod full_disk;
mod hostile_delivery;
mod images;
mod killing;
mod large_events;
mod load;
mod lost_database;
mod lost_stream;
mod metrics;
mod monitoring;
mod nats_cluster;
mod nats_outage;
mod new_tickets;
mod paying;
mod payment_conflicts;
mod poison;
mod postgres_restart;
mod races;
mod rebuild_under_load;
mod records;
mod relay_crashes;
mod replica;
mod replies;
mod rolling_restart;
mod selling_once;
mod settled;
mod small_disk;
mod small_stream;
mod starting_and_stopping;
mod system;
mod the_pair;
mod the_session;
