//! The operating system thread a connection lives on.
//!
//! One current-thread runtime per connection was measured to be the fastest way to drive quinn (DESIGN, section 9):
//! its tasks never change threads, and the threads that read and place pages do not compete with it for a scheduler.

use std::future::Future;
use std::io;
use std::thread::JoinHandle;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task;

/// A thread that runs async tasks until it is dropped.
pub struct TransportThread {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TransportThread {
    /// Starts the thread; `name` is shown by the kernel, cut to 15 bytes.
    pub fn spawn(name: &str) -> io::Result<TransportThread> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // Either the owner says stop or is gone; both mean the same.
                let _ = runtime.block_on(stopped);
            })?;
        Ok(TransportThread {
            handle,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Runs `future` on the thread; the handle can be awaited anywhere.
    pub fn run<F>(&self, future: F) -> task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.handle.spawn(future)
    }

    /// The runtime, to spawn on it or to wait for a future on the caller's own thread.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for TransportThread {
    /// Stops all tasks and waits for the thread, unless the thread itself is the one that drops.
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the transport thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn tasks_run_on_the_thread_and_end_with_it() {
        let thread = TransportThread::spawn("transport-test").expect("a thread");
        let name = thread.run(async { std::thread::current().name().map(str::to_owned) });
        let name = thread.handle().block_on(name).expect("runs");
        assert_eq!(name.as_deref(), Some("transport-test"));
        let (kept, gone) = oneshot::channel::<()>();
        thread.run(async move {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            drop(kept);
        });
        drop(thread);
        assert!(gone.blocking_recv().is_err(), "the task was dropped");
    }
}
