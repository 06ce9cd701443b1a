//! What a fault costs in post-copy: the time from the pager's request on the supply line until the page is in the store,
//! announced, idle and under full push, against the bare round trip of as many bytes over the same kind of connection.
//!
//! ```text
//!  this process: pager's end of the supply line ◀─▶ PostCopy ◀══ QUIC, loopback ══▶ PageServer ──▶ a child's memory
//! ```
//!
//! One task faults at a time, at pages in no order, each asked for alone: what is measured is the path, and neither the pager
//! nor the guessing of neighbours.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use migrate::memory::{PAGE_SIZE, PageNumber, PageRange, PageSet, SpaceId};
use migrate::source::send::PagesToSend;
use migrate::source::serve::{PageServer, Serving};
use migrate::target::arrivals::Arrivals;
use migrate::target::page_store::{PageRun, PageStore, PageStoreLimits, RunContent};
use migrate::target::pager::{Heard, SupplyLine, SupplyMessage};
use migrate::target::post_copy::{OwingTask, PostCopy, PostCopying};
use migrate::transport::{
    Connection, Connector, Control, Identity, Listener, Settings, TransportThread, TrustStore,
    TwoWay,
};
use migrate::wire::codec::{Codec, Compression};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

const SPACE: SpaceId = SpaceId(1);
const VPID: i32 = 1;
const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes of a page request, and of the frame that brings one page.
const REQUEST: usize = 24;
const ANSWER: usize = 40 + 16 + PAGE_SIZE as usize;

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// MiB of memory that the source owes.
    #[arg(long, default_value_t = 1024)]
    memory: u64,
    /// Times that the memory is moved under faults.
    #[arg(long, default_value_t = 3)]
    repetitions: u32,
    /// Directory for faults.jsonl.
    #[arg(long)]
    results: PathBuf,
}

/// One line of faults.jsonl.
#[derive(Debug, Serialize)]
struct Record {
    bench: &'static str,
    what: &'static str,
    samples: usize,
    p50_us: f64,
    p90_us: f64,
    p99_us: f64,
    max_us: f64,
    /// p99 divided by the median of the bare round trip.
    p99_by_bare_p50: f64,
    /// MB/s of frames pushed meanwhile.
    push_mb_s: f64,
    commit: String,
    kernel: String,
    load_before: f64,
}

/// Measures all three, and says on standard output what it wrote.
pub fn run(options: &Options) -> Result<bool> {
    std::fs::create_dir_all(&options.results)
        .with_context(|| format!("creating {}", options.results.display()))?;
    let path = options.results.join("faults.jsonl");
    let mut out = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    let machine = crate::record::Machine::read()?;
    let site = Site::new()?;

    let mut bare_p50 = 0.0;
    let mut record = |what, mut took: Vec<Duration>, push_mb_s: f64, load| -> Result<()> {
        ensure!(!took.is_empty(), "{what}: nothing was measured");
        took.sort_unstable();
        let at = |share: f64| {
            let index = ((took.len() - 1) as f64 * share).round() as usize;
            took[index].as_secs_f64() * 1e6
        };
        if what == "bare" {
            bare_p50 = at(0.5);
        }
        let record = Record {
            bench: "faults",
            what,
            samples: took.len(),
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            max_us: at(1.0),
            p99_by_bare_p50: at(0.99) / bare_p50,
            push_mb_s,
            commit: machine.commit.clone(),
            kernel: machine.kernel.clone(),
            load_before: load,
        };
        let line = serde_json::to_string(&record)?;
        println!("{line}");
        writeln!(out, "{line}")?;
        Ok(())
    };
    let load = crate::record::load()?;
    record("bare", site.bare(20_000)?, 0.0, load)?;
    let holder = Holder::start(options.memory)?;
    let load = crate::record::load()?;
    record("idle", site.idle(&holder, 10_000)?, 0.0, load)?;
    for _ in 0..options.repetitions {
        let load = crate::record::load()?;
        let (took, push_mb_s) = site.under_push(&holder)?;
        record("push", took, push_mb_s, load)?;
    }
    Ok(true)
}

/// Memory that somebody else reads: says where it is, and waits until its input ends.
pub fn hold(mib: u64) -> Result<()> {
    let pages = (mib << 20) / PAGE_SIZE;
    let mut memory = vec![0u64; ((pages + 1) * PAGE_SIZE / 8) as usize];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in &mut memory {
        // xorshift64: enough that nothing compresses.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state;
    }
    println!("{}", (memory.as_ptr() as u64).div_ceil(PAGE_SIZE));
    std::io::stdin().read_to_end(&mut Vec::new())?;
    std::hint::black_box(&memory);
    Ok(())
}

/// A child with memory.
struct Holder {
    process: Child,
    all: PageRange,
}

impl Holder {
    fn start(mib: u64) -> Result<Holder> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(["part", "hold", &mib.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let output = process.stdout.take().context("no output")?;
        BufReader::new(output).read_line(&mut line)?;
        let first = PageNumber(line.trim().parse().context("where the memory is")?);
        let all = PageRange::from_start_len(first, (mib << 20) / PAGE_SIZE).context("no memory")?;
        Ok(Holder { process, all })
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It ends with its input in any case.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Two hosts on loopback.
struct Site {
    source: TransportThread,
    target: TransportThread,
    listener: Arc<Listener>,
    connector: Connector,
    _keys: Keys,
}

/// The directories of the hosts' identities.
struct Keys(PathBuf);

impl Drop for Keys {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Both ends of a connection, and what keeps it open.
type Wire = ((Connection, Control), (Connection, Control));

impl Site {
    fn new() -> Result<Site> {
        let keys = Keys(std::env::temp_dir().join(format!("bench-faults-{}", std::process::id())));
        let host = |name: &str| -> Result<_> {
            let dir = keys.0.join(name);
            std::fs::create_dir_all(&dir)?;
            Ok((
                Arc::new(Identity::load_or_create(&dir)?),
                TrustStore::in_dir(&dir),
            ))
        };
        let (near, far) = (host("source")?, host("target")?);
        near.1.add("target".parse()?, far.0.fingerprint())?;
        far.1.add("source".parse()?, near.0.fingerprint())?;
        let source = TransportThread::spawn("source")?;
        let target = TransportThread::spawn("target")?;
        let listening = target.run(async move {
            Listener::bind(
                ([127, 0, 0, 1], 0).into(),
                far.0,
                far.1,
                Settings::default(),
            )
        });
        let listener = target.handle().block_on(listening)??;
        Ok(Site {
            source,
            target,
            listener: Arc::new(listener),
            connector: Connector::new(near.0, near.1, Settings::default()),
            _keys: keys,
        })
    }

    fn connect(&self) -> Result<Wire> {
        let listener = Arc::clone(&self.listener);
        let accepting = self.target.run(async move {
            match listener.accept().await {
                Some(arrival) => Some(arrival.handshake().await),
                None => None,
            }
        });
        let (connector, addr) = (self.connector.clone(), self.listener.local_addr()?);
        let connecting = self
            .source
            .run(async move { connector.connect(addr).await });
        let from = self.source.handle().block_on(connecting)??;
        let to = self.target.handle().block_on(accepting)?;
        Ok((from, to.context("the listener is closed")??))
    }

    /// Requests and answers of the length of a fault's, from task to task.
    fn bare(&self, samples: usize) -> Result<Vec<Duration>> {
        let ((from, _ask), (to, _answer)) = self.connect()?;
        let answering = self.source.run(async move {
            let (mut send, mut receive) = from.open_stream(TwoWay::Rootfs, 0).await?;
            let mut request = [0; REQUEST];
            while receive.read_exact(&mut request).await.is_ok() {
                send.write_all(&[7; ANSWER]).await?;
            }
            anyhow::Ok(())
        });
        let asking = self.target.run(async move {
            let (_, mut send, mut receive) = to.accept_stream(TwoWay::Rootfs).await?;
            let (mut took, mut answer) = (Vec::with_capacity(samples), vec![0; ANSWER]);
            for _ in 0..samples {
                let start = Instant::now();
                send.write_all(&[1; REQUEST]).await?;
                receive.read_exact(&mut answer).await?;
                took.push(start.elapsed());
            }
            send.finish()?;
            anyhow::Ok(took)
        });
        let took = self.target.handle().block_on(asking)??;
        self.source.handle().block_on(answering)??;
        Ok(took)
    }

    /// Faults while nothing is pushed.
    fn idle(&self, holder: &Holder, samples: usize) -> Result<Vec<Duration>> {
        let wire = self.connect()?;
        // A frame or two go at once, and then nothing for hours.
        wire.0.0.set_bandwidth_limit(NonZeroU64::new(1));
        let mut moving = Moving::start(&wire, holder)?;
        let mut took = Vec::with_capacity(samples);
        for index in scattered(holder.all.pages()) {
            if took.len() == samples || moving.pager.came.pages() * 2 > holder.all.pages() {
                break;
            }
            took.extend(moving.pager.fault(index)?);
        }
        moving.abandon();
        Ok(took)
    }

    /// Faults until everything has come, and how fast the rest was pushed meanwhile.
    fn under_push(&self, holder: &Holder) -> Result<(Vec<Duration>, f64)> {
        let wire = self.connect()?;
        let start = Instant::now();
        let mut moving = Moving::start(&wire, holder)?;
        let mut took = Vec::new();
        for index in scattered(holder.all.pages()) {
            // The last tenth is left to the push: hardly any page of it is not on its way.
            if moving.pager.came.pages() * 10 > holder.all.pages() * 9 {
                break;
            }
            took.extend(moving.pager.fault(index)?);
        }
        let seconds = start.elapsed().as_secs_f64();
        let pushed = moving.progress.now().pushed_bytes as f64 / seconds / 1e6;
        moving.finish()?;
        Ok((took, pushed))
    }
}

/// Post-copy under way.
struct Moving {
    serving: Serving,
    copying: PostCopying,
    pager: Pager,
    progress: Arc<migrate::source::serve::ServeProgress>,
}

impl Moving {
    fn start(((from, _), (to, _)): &Wire, holder: &Holder) -> Result<Moving> {
        let store = Arc::new(PageStore::new(PageStoreLimits {
            spaces: 1,
            bytes: holder.all.bytes(),
        }));
        let owed = PageRun {
            pages: holder.all,
            content: RunContent::Owed,
        };
        store.place(SPACE, &[owed], &[])?;
        let (theirs, ours) = SupplyLine::pair()?;
        let pager = Pager {
            line: theirs,
            memfd: store.memfd(SPACE)?.into(),
            all: holder.all,
            came: PageSet::new(),
        };
        let task = OwingTask {
            space: SPACE,
            vpid: VPID,
            owed: [holder.all].into_iter().collect(),
            arrivals: Arrivals::new()?,
        };
        let pages = PagesToSend {
            space: SPACE,
            pid: holder.process.id().cast_signed(),
            pages: [holder.all].into_iter().collect(),
        };
        let server = PageServer::new(vec![pages], Compression::Always(Codec::None))?;
        let progress = server.progress();
        let copying = PostCopy::new(store, ours, vec![task])?.attach(to);
        let serving = server.attach(from)?;
        Ok(Moving {
            serving,
            copying,
            pager,
            progress,
        })
    }

    fn finish(mut self) -> Result<()> {
        let all = self.pager.all.pages();
        self.pager.take_until(|pager| pager.came.pages() == all)?;
        self.copying.wait().1?;
        self.serving.wait().1?;
        Ok(())
    }

    fn abandon(self) {
        self.serving.stop();
        // Both say that they were stopped.
        let _ = self.serving.wait();
        let _ = self.copying.wait();
    }
}

/// The other end of the supply line.
struct Pager {
    line: SupplyLine,
    memfd: File,
    all: PageRange,
    came: PageSet,
}

impl Pager {
    /// How long one page took, if it had not come before.
    fn fault(&mut self, index: u64) -> Result<Option<Duration>> {
        // What came meanwhile is not waited for.
        while self.take()? {}
        let page = PageNumber(self.all.start().0 + index);
        if self.came.contains(page) {
            return Ok(None);
        }
        let pages = PageRange::from_start_len(page, 1).context("a page of the memory")?;
        let start = Instant::now();
        let want = SupplyMessage::Want { vpid: VPID, pages };
        ensure!(self.line.send(want)?, "the supply line is full");
        self.take_until(|pager| pager.came.contains(page))?;
        Ok(Some(start.elapsed()))
    }

    fn take_until(&mut self, enough: impl Fn(&Pager) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !enough(self) {
            if !self.take()? {
                ensure!(Instant::now() < deadline, "nothing came");
                let mut polled = [PollFd::new(self.line.as_fd(), PollFlags::POLLIN)];
                poll(&mut polled, PollTimeout::from(100u8))?;
            }
        }
        Ok(())
    }

    /// Takes one announcement, and frees its pages as a pager does. Whether there was one.
    fn take(&mut self) -> Result<bool> {
        match self.line.receive()? {
            Heard::Nothing => return Ok(false),
            Heard::Message(SupplyMessage::Came { pages, .. }) => {
                self.came.insert(pages);
                let flags =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let offset = pages.start().addr().0.cast_signed();
                fallocate(&self.memfd, flags, offset, pages.bytes().cast_signed())?;
            }
            Heard::Message(SupplyMessage::AskAgain) => {}
            other => bail!("the agent says {other:?}"),
        }
        Ok(true)
    }
}

/// Numbers below `below` in no order, the same every time, without end.
fn scattered(below: u64) -> impl Iterator<Item = u64> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    })
}
