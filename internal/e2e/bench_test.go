//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/image"
	"github.com/cloudcode-dev/cloudcode/internal/container"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

const pairs = 11

// BenchmarkStart measures the time from CreateSession to the first answer of
// OpenCode through the gateway, beside `ctr run` of the same image on the same
// containerd and the first answer of its OpenCode: one after the other, again
// and again, so that both see the same machine.
func BenchmarkStart(b *testing.B) {
	f := shared(b)
	f.benchSession(b, 0, nil) // page cache, connections
	f.benchCtr(b, 0)
	var ours, bare []time.Duration
	phases := map[string][]time.Duration{}
	for i := range pairs {
		if i%2 == 0 {
			ours = append(ours, f.benchSession(b, i+1, phases))
			bare = append(bare, f.benchCtr(b, i+1))
		} else {
			bare = append(bare, f.benchCtr(b, i+1))
			ours = append(ours, f.benchSession(b, i+1, phases))
		}
	}
	o, c := median(ours), median(bare)
	ratio := float64(o) / float64(c)
	// Each pair saw the same machine: what else ran there counts for both.
	var paired []float64
	for i := range ours {
		paired = append(paired, float64(ours[i])/float64(bare[i]))
	}
	slices.Sort(paired)
	b.ReportMetric(paired[pairs/2], "pair-ratio")
	b.ReportMetric(0, "ns/op") // it would be of the whole series
	b.ReportMetric(float64(o.Milliseconds()), "ms/session")
	b.ReportMetric(float64(c.Milliseconds()), "ms/ctr-run")
	b.ReportMetric(ratio, "ratio")
	var out strings.Builder
	fmt.Fprintf(&out, "create to first answer, medians of %d pairs on %d CPUs: session %v, ctr run and OpenCode's boot %v, ratio %.3f (aim 1.05)\n",
		pairs, runtime.NumCPU(), o.Round(time.Millisecond), c.Round(time.Millisecond), ratio)
	fmt.Fprintf(&out, "ratio of each pair: median %.3f, from %.3f to %.3f\n", paired[pairs/2], paired[0], paired[pairs-1])
	fmt.Fprintf(&out, "where a session's start goes, from CreateSession on (medians):\n")
	for _, p := range []string{"acknowledged", "placed", "container", "opencode", "running", "answered"} {
		if len(phases[p]) > 0 {
			fmt.Fprintf(&out, "  %-13s %6.0f ms\n", p, float64(median(phases[p]).Microseconds())/1000)
		}
	}
	for _, p := range []string{"ctr run returns", "health answers"} {
		fmt.Fprintf(&out, "  (ctr) %-15s %6.0f ms\n", p, float64(median(benchCtrPhases[p]).Microseconds())/1000)
	}
	fmt.Print(out.String())
}

func median(d []time.Duration) time.Duration {
	if len(d) == 0 {
		return 0
	}
	s := slices.Clone(d)
	slices.Sort(s)
	return s[len(s)/2]
}

// benchSession returns the time from the call to the answer, and adds the phases.
func (f *fleet) benchSession(b *testing.B, n int, phases map[string][]time.Duration) time.Duration {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	id := fmt.Sprintf("%sbench%d", idPrefix, n)
	url := "http://" + f.host(id) + "/global/health"

	start := time.Now()
	s, err := f.sessions.CreateSession(ctx, &cloudcodev1.CreateSessionRequest{SessionId: id, Session: &cloudcodev1.Session{}})
	if err != nil {
		b.Fatal(err)
	}
	defer f.remove(b, id)
	acknowledged := time.Since(start)
	seen := map[string]time.Duration{}
	var watch sync.WaitGroup
	stream, err := f.sessions.WatchSessionEvents(ctx, &cloudcodev1.WatchSessionEventsRequest{Name: s.GetName()})
	if err != nil {
		b.Fatal(err)
	}
	watch.Go(func() {
		for {
			e, err := stream.Recv()
			if err != nil {
				return
			}
			l := e.GetLifecycle().GetSession()
			phase := l.GetProgress().GetPhase()
			if l.GetState() == cloudcodev1.Session_RUNNING {
				phase = "running"
			}
			if _, had := seen[phase]; !had && phase != "" {
				seen[phase] = time.Since(start)
			}
			if phase == "running" {
				return
			}
		}
	})
	// The gateway lets the request wait until the session runs.
	for {
		code, _, err := f.call(ctx, "GET", url, nil)
		if err == nil && code == http.StatusOK {
			break
		}
		if ctx.Err() != nil {
			b.Fatalf("%s: %d %v", url, code, err)
		}
		pauseFor(ctx, time.Millisecond)
	}
	took := time.Since(start)
	watch.Wait()
	if phases != nil {
		seen["acknowledged"], seen["answered"] = acknowledged, took
		for p, d := range seen {
			phases[p] = append(phases[p], d)
		}
	}
	return took
}

func pauseFor(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

var benchCtrPhases = map[string][]time.Duration{}

// benchCtr returns the time from `ctr run` to the first answer of OpenCode.
func (f *fleet) benchCtr(b *testing.B, n int) time.Duration {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	id := fmt.Sprintf("%sctr%d", idPrefix, n)
	ctr := func(args ...string) string {
		return mustRun(b, time.Minute, cleanEnv(), filepath.Join(work.libexec, "ctr"), append([]string{"-a", f.containerd(b), "-n", "cloudcode"}, args...)...)
	}
	dir := b.TempDir()
	const base = 0x20000000 // ids that no session has
	storage := filepath.Join(dir, "s3")
	if err := errors.Join(os.Mkdir(storage, 0o755), os.Chown(storage, base, base), os.Chmod(dir, 0o755)); err != nil {
		b.Fatal(err)
	}
	pidFile := filepath.Join(dir, "pid")
	ids := fmt.Sprintf("0:%d:65536", base)

	start := time.Now()
	ctr("run", "-d", "--snapshotter", "overlayfs", "--uidmap", ids, "--gidmap", ids, "--remap-labels", "--seccomp",
		"--cgroup", cgroupParent(filepath.Dir(f.containerd(b)))+"/"+id,
		"--env", container.EnvPassword+"=secret", "--pid-file", pidFile,
		"--mount", "type=bind,src="+storage+",dst="+container.StorageDir+",options=rbind:rw", image.DefaultRef, id)
	defer func() {
		ctr("task", "kill", "-s", "KILL", id)
		eventually(b, 20*time.Second, "the task ends", func() string {
			if !strings.Contains(ctr("task", "ls"), id+" ") || strings.Contains(ctr("task", "ls"), "STOPPED") {
				return ""
			}
			return "it runs"
		})
		ctr("task", "rm", "-f", id)
		ctr("container", "rm", id)
	}()
	returned := time.Since(start)
	pid, err := os.ReadFile(pidFile)
	if err != nil {
		b.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return dialInside(ctx, strings.TrimSpace(string(pid)), addr)
		},
	}}
	for {
		// A request that comes while OpenCode starts may never be answered.
		pctx, stop := context.WithTimeout(ctx, 100*time.Millisecond)
		req, err := http.NewRequestWithContext(pctx, "GET", "http://127.0.0.1:"+strconv.Itoa(container.OpenCodePort)+"/global/health", nil)
		if err != nil {
			b.Fatal(err)
		}
		req.SetBasicAuth(container.OpenCodeUser, "secret")
		resp, err := client.Do(req)
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		stop()
		if err == nil && resp.StatusCode == http.StatusOK {
			break
		}
		if ctx.Err() != nil {
			b.Fatalf("no answer from ctr's container: %v", err)
		}
		pauseFor(ctx, 5*time.Millisecond)
	}
	took := time.Since(start)
	if n > 0 {
		benchCtrPhases["ctr run returns"] = append(benchCtrPhases["ctr run returns"], returned)
		benchCtrPhases["health answers"] = append(benchCtrPhases["health answers"], took)
	}
	return took
}

// dialInside dials from within the network namespace of a process.
func dialInside(ctx context.Context, pid, addr string) (net.Conn, error) {
	type dialed struct {
		conn net.Conn
		err  error
	}
	ch := make(chan dialed, 1)
	go func() {
		// The thread is given up with the goroutine: nothing else runs in there.
		runtime.LockOSThread()
		ns, err := os.Open("/proc/" + pid + "/ns/net")
		if err != nil {
			ch <- dialed{err: err}
			return
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			ch <- dialed{err: err}
			return
		}
		// By system calls: the net package may dial on another thread.
		conn, err := dialHere(addr)
		ch <- dialed{conn, err}
	}()
	select {
	case d := <-ch:
		return d.conn, d.err
	case <-ctx.Done():
		go func() {
			if d := <-ch; d.conn != nil {
				d.conn.Close()
			}
		}()
		return nil, ctx.Err()
	}
}

func dialHere(addr string) (net.Conn, error) {
	to, err := net.ResolveTCPAddr("tcp4", addr)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "inside")
	defer file.Close()
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: to.Port, Addr: [4]byte(to.IP.To4())}); err != nil {
		return nil, err
	}
	return net.FileConn(file)
}

// benchServer answers small requests as fast as it can: an HTTP server of
// Python's or Node's own would be what is measured.
const benchServer = `const net = require("net");
const answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: text/plain\r\n\r\nok";
net.createServer((c) => { let rest = ""; c.setNoDelay(true); c.on("error", () => {}); c.on("data", (d) => {
  rest += d.toString("latin1"); let n = 0, i; while ((i = rest.indexOf("\r\n\r\n")) >= 0) { rest = rest.slice(i + 4); n++; }
  if (n) c.write(answer.repeat(n)); }); }).listen(3000, "127.0.0.1", () => console.log("up"));`

// BenchmarkProxy compares small HTTP requests through gateway and link with the
// same requests made directly inside the container's network.
func BenchmarkProxy(b *testing.B) {
	f := shared(b)
	id := f.session(b, "benchproxy", nil)
	f.bash(b, id, "cat > /tmp/s.js <<'EOF'\n"+benchServer+"\nEOF\nnohup node /tmp/s.js > /tmp/s.log 2>&1 & for i in $(seq 100); do grep -q up /tmp/s.log && break; sleep 0.05; done")
	pid := f.containerPID(b, id)
	direct := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64, DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
		return dialInside(ctx, pid, addr)
	}}}
	defer direct.CloseIdleConnections()
	type way struct {
		name, url string
		client    *http.Client
	}
	ways := []way{{"direct", "http://127.0.0.1:3000/", direct}, {"gateway", "http://3000--" + f.host(id) + "/", f.http}}
	latency, rate := map[string][]time.Duration{}, map[string][]float64{}
	const parallel, span, rounds = 16, time.Second, 5
	once := func(w way) error {
		req, err := f.request(context.Background(), "GET", w.url, nil)
		if err != nil {
			return err
		}
		resp, err := w.client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "ok" {
			return fmt.Errorf("%s: %s %q %w", w.url, resp.Status, body, err)
		}
		return nil
	}
	for range rounds {
		for _, w := range ways {
			var all []time.Duration
			for range 300 {
				t := time.Now()
				if err := once(w); err != nil {
					b.Fatal(err)
				}
				all = append(all, time.Since(t))
			}
			latency[w.name] = append(latency[w.name], median(all))

			var count atomic.Int64
			var group sync.WaitGroup
			end := time.Now().Add(span)
			for range parallel {
				group.Go(func() {
					for time.Now().Before(end) {
						if err := once(w); err != nil {
							b.Error(err)
							return
						}
						count.Add(1)
					}
				})
			}
			group.Wait()
			rate[w.name] = append(rate[w.name], float64(count.Load())/span.Seconds())
		}
	}
	middle := func(r []float64) float64 { s := slices.Clone(r); slices.Sort(s); return s[len(s)/2] }
	ld, lg := median(latency["direct"]), median(latency["gateway"])
	rd, rg := middle(rate["direct"]), middle(rate["gateway"])
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(lg.Microseconds()), "µs/request")
	b.ReportMetric(float64(lg)/float64(ld), "latency-ratio")
	b.ReportMetric(rg/rd, "throughput-ratio")
	fmt.Printf("small HTTP requests, client, gateway and node daemon on the same %d CPUs: latency %v direct, %v through the gateway (%.1f times); %d at a time: %.0f/s direct, %.0f/s through the gateway (%.2f times)\n",
		runtime.NumCPU(), ld.Round(time.Microsecond), lg.Round(time.Microsecond), float64(lg)/float64(ld), parallel, rd, rg, rg/rd)
}
