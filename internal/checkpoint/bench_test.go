package checkpoint

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// words is text that compresses about as source code does.
func words(rng *rand.Rand, n int) []byte {
	vocabulary := make([]string, 2000)
	for i := range vocabulary {
		b := make([]byte, 3+rng.IntN(9))
		for j := range b {
			b[j] = byte('a' + rng.IntN(26))
		}
		vocabulary[i] = string(b)
	}
	out := make([]byte, 0, n+16)
	for len(out) < n {
		// Squared: few words are frequent.
		f := rng.Float64()
		out = append(out, vocabulary[int(f*f*f*float64(len(vocabulary)))]...)
		out = append(out, " \n\t(){};=."[rng.IntN(10)])
	}
	return out[:n]
}

// modules is a tree like OpenCode's plugin folder: 63 MB in 3,650 files.
func modules(b *testing.B, dir string) {
	b.Helper()
	rng := rand.New(rand.NewPCG(1, 2))
	text := words(rng, 4<<20)
	total := 0
	for i := range 3650 {
		n := int(rng.ExpFloat64() * 11_000)
		if i%73 == 0 {
			n = 500_000
		}
		if i == 3649 {
			n = max(n, 63_000_000-total)
		}
		total += n
		p := filepath.Join(dir, fmt.Sprintf("node_modules/pkg%03d/lib%d/file%d.js", i%120, i%4, i))
		must(b, os.MkdirAll(filepath.Dir(p), 0o755))
		at := rng.IntN(len(text) / 2)
		body := append([]byte(nil), text[at:at+min(n, len(text)/2)]...)
		for len(body) < n {
			body = append(body, text[:min(len(text), n-len(body))]...)
		}
		for j := 0; j < len(body); j += 300 + rng.IntN(300) { // no two are alike
			body[j] = byte('A' + rng.IntN(26))
		}
		must(b, os.WriteFile(p, body, 0o644))
	}
	b.Logf("%d bytes", total)
}

// A first checkpoint and a restore of 63 MB in 3,650 files, beside what one would
// use instead.
func BenchmarkModules(b *testing.B) {
	needRoot(b)
	src := os.Getenv("CHECKPOINT_BENCH_TREE") // a real tree, if there is one
	if src == "" {
		src = filepath.Join(b.TempDir(), "tree")
		modules(b, src)
	}
	b.Run("Save", func(b *testing.B) {
		var sent int64
		for b.Loop() {
			b.StopTimer()
			r := benchRig(b, objstore.NewMemory(), src, nil)
			b.StartTimer()
			r.save()
			sent = r.w.Stats().Sent
		}
		b.ReportMetric(float64(sent)/1e6, "MB-sent")
	})
	b.Run("SaveEncrypted", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			r := benchRig(b, objstore.NewMemory(), src, make([]byte, 32))
			b.StartTimer()
			r.save()
		}
	})
	b.Run("Restore", func(b *testing.B) {
		r := benchRig(b, objstore.NewMemory(), src, nil)
		r.save()
		for i := 0; b.Loop(); i++ {
			dir := filepath.Join(b.TempDir(), fmt.Sprint(i))
			_, err := r.s.Restore(b.Context(), "", RestoreOptions{Dir: dir})
			must(b, err)
			b.StopTimer()
			os.RemoveAll(dir)
			b.StartTimer()
		}
	})
	b.Run("TarZstdSave", func(b *testing.B) {
		out := filepath.Join(b.TempDir(), "x")
		for b.Loop() {
			run(b, "tar -C "+src+" -cf - . | zstd -1 -q -f -o "+out)
		}
		st, err := os.Stat(out)
		must(b, err)
		b.ReportMetric(float64(st.Size())/1e6, "MB-sent")
	})
	b.Run("TarZstdRestore", func(b *testing.B) {
		out := filepath.Join(b.TempDir(), "x")
		run(b, "tar -C "+src+" -cf - . | zstd -1 -q -f -o "+out)
		for i := 0; b.Loop(); i++ {
			dir := filepath.Join(b.TempDir(), fmt.Sprint(i))
			must(b, os.Mkdir(dir, 0o755))
			run(b, "zstd -dc "+out+" | tar -C "+dir+" -xf - && sync -f "+dir)
			b.StopTimer()
			os.RemoveAll(dir)
			b.StartTimer()
		}
	})
	if _, err := exec.LookPath("restic"); err != nil {
		return
	}
	b.Setenv("RESTIC_PASSWORD", "x")
	b.Setenv("RESTIC_CACHE_DIR", b.TempDir())
	b.Run("ResticSave", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			b.StopTimer()
			repo := filepath.Join(b.TempDir(), fmt.Sprint(i))
			run(b, "restic init -q -r "+repo)
			b.StartTimer()
			run(b, "cd "+src+" && restic backup -q -r "+repo+" .")
		}
	})
	b.Run("ResticRestore", func(b *testing.B) {
		repo := filepath.Join(b.TempDir(), "repo")
		run(b, "restic init -q -r "+repo+" && cd "+src+" && restic backup -q -r "+repo+" .")
		for i := 0; b.Loop(); i++ {
			run(b, fmt.Sprintf("restic restore -q -r %s latest --target %s/%d", repo, b.TempDir(), i))
		}
	})
}

func run(b *testing.B, cmd string) {
	b.Helper()
	if out, err := exec.Command("sh", "-c", cmd).CombinedOutput(); err != nil {
		b.Fatalf("%s: %v\n%s", cmd, err, out)
	}
}

func benchRig(b *testing.B, store objstore.Store, tree string, key []byte) *rig {
	b.Helper()
	repo, err := Open(store, "root", key)
	must(b, err)
	r := &rig{t: b, store: store, repo: repo, s: repo.Session("s")}
	r.o = WriterOptions{Dir: tree, StateDir: b.TempDir(), Owner: owner1}
	_, _, err = r.s.Acquire(context.Background(), owner1)
	must(b, err)
	r.open()
	return r
}

// Ten files changed in a tree of 50,000, with a store 25 ms away.
func BenchmarkTenOf50000(b *testing.B) {
	needRoot(b)
	src := filepath.Join(b.TempDir(), "tree")
	rng := rand.New(rand.NewPCG(3, 4))
	text := words(rng, 1<<20)
	file := func(i int) string { return filepath.Join(src, fmt.Sprintf("d%02d/e%03d/f%05d.go", i%20, i%400, i)) }
	for i := range 50_000 {
		must(b, os.MkdirAll(filepath.Dir(file(i)), 0o755))
		at := rng.IntN(len(text) - 4096)
		must(b, os.WriteFile(file(i), text[at:at+rng.IntN(4096)], 0o644))
	}
	m := objstore.NewMemory()
	r := benchRig(b, m, src, nil)
	r.save()
	m.Latency = 25 * time.Millisecond
	var frozen time.Duration
	var sent int64
	n := 0
	m.ResetStats()
	for b.Loop() {
		b.StopTimer()
		for range 10 {
			must(b, os.WriteFile(file(rng.IntN(50_000)), text[rng.IntN(1000):][:2000], 0o644))
		}
		b.StartTimer()
		r.save()
		frozen += r.w.Stats().Frozen
		sent += r.w.Stats().Sent
		n++
	}
	b.ReportMetric(float64(frozen.Milliseconds())/float64(n), "ms-frozen")
	b.ReportMetric(float64(sent)/float64(n)/1e3, "kB-sent")
	b.ReportMetric(float64(m.Stats().Total())/float64(n), "requests")
}

// A database of SQLite's that is written as OpenCode does: its log grows, and now
// and then goes into the pages of a file of 50 MB.
func BenchmarkDatabase(b *testing.B) {
	needRoot(b)
	src := filepath.Join(b.TempDir(), "tree")
	must(b, os.Mkdir(src, 0o755))
	rng := rand.New(rand.NewPCG(5, 6))
	text := words(rng, 1<<20)
	page := func() []byte { return text[rng.IntN(len(text)-4096):][:4096] }
	db, err := os.Create(filepath.Join(src, "opencode.db"))
	must(b, err)
	defer db.Close()
	const pages = 50 << 20 / 4096
	for i := range pages {
		p := append([]byte(nil), page()...)
		if i == 0 {
			copy(p, "SQLite format 3\x00")
		}
		_, err := db.WriteAt(p, int64(i)*4096)
		must(b, err)
	}
	wal, err := os.Create(filepath.Join(src, "opencode.db-wal"))
	must(b, err)
	defer wal.Close()
	_, err = wal.Write(append([]byte{0x37, 0x7f, 0x06, 0x82}, make([]byte, 28)...))
	must(b, err)
	r := benchRig(b, objstore.NewMemory(), src, nil)
	r.save()
	var sent int64
	var frozen time.Duration
	at, n := int64(32), 0
	for b.Loop() {
		b.StopTimer()
		for range 60 { // a turn: 240 KB of log
			_, err := wal.WriteAt(append(append([]byte(nil), text[:24]...), page()...), at)
			must(b, err)
			at += 4096 + 24
		}
		if n++; n%16 == 0 { // SQLite's checkpoint: the log's pages go to their places
			at = 32
			for i := range 300 {
				where := int64(pages-1-i) * 4096 // what was appended last
				if i%3 == 0 {
					where = rng.Int64N(pages-1)*4096 + 4096
				}
				_, err := db.WriteAt(page(), where)
				must(b, err)
			}
		}
		b.StartTimer()
		r.save()
		sent += r.w.Stats().Sent
		frozen += r.w.Stats().Frozen
	}
	b.ReportMetric(float64(sent)/float64(n)/1e3, "kB-sent")
	b.ReportMetric(float64(frozen.Microseconds())/float64(n)/1e3, "ms-frozen")
}
