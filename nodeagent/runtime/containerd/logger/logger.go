// Package logger keeps what a container prints. Run is the program that
// containerd's shim starts for each container; Read gives the lines back.
//
// Files are in the CRI log format, one line each, so that log shippers
// understand them:
//
//	2026-11-23T20:35:51.123456789Z stdout F the line
//
// The tag is F for a full line and P for a part of one longer than 16 KiB. The
// newest file is container.log; older ones are container.log.1 and so on.
package logger

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Size and number of files kept for one container.
const (
	MaxFileBytes = 10 << 20
	MaxFiles     = 3
)

const (
	fileName    = "container.log"
	maxLine     = 16 << 10
	timeFormat  = time.RFC3339Nano
	drainBudget = 2 * time.Second
)

// Main is what the hidden subcommand `container-log DIR` calls: containerd's
// shim gives stdout, stderr and a readiness pipe as descriptors 3, 4 and 5.
// It returns when the container has closed both, or a moment after SIGTERM.
//
// Call it before anything else in main: one such process runs per session, so
// its start is part of every session's start.
func Main(dir string) error {
	// One of these lives beside each session; a small heap matters more than
	// its speed.
	stdout, stderr := os.NewFile(3, "stdout"), os.NewFile(4, "stderr")
	ready := os.NewFile(5, "ready")
	if stdout == nil || stderr == nil || ready == nil {
		return errors.New("container-log is started by containerd, not by people")
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	return run(ctx, dir, stdout, stderr, func() error {
		// A byte and the end: newer shims want the byte, older ones the end.
		_, err := ready.Write([]byte{0})
		return errors.Join(err, ready.Close())
	})
}

// run copies until both ends are closed. Once ctx has ended it goes on for
// drainBudget at most: the shim sends SIGTERM when the container has exited,
// and what it printed last is still in the pipes.
func run(ctx context.Context, dir string, stdout, stderr io.ReadCloser, ready func() error) error {
	w := newWriter(dir, MaxFileBytes, MaxFiles)
	defer w.close()
	var wg sync.WaitGroup
	wg.Go(func() { copyLines(w, "stdout", stdout) })
	wg.Go(func() { copyLines(w, "stderr", stderr) })
	if err := ready(); err != nil {
		return fmt.Errorf("telling containerd that the logger is ready: %w", err)
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	t := time.NewTimer(drainBudget)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		_ = stdout.Close()
		_ = stderr.Close()
		<-done
	}
	return nil
}

// copyLines reads to the end whatever happens to the writing: a container must
// never block because its log cannot be written.
func copyLines(w *writer, stream string, r io.Reader) {
	br := bufio.NewReaderSize(r, maxLine)
	for {
		line, err := br.ReadSlice('\n')
		full := err == nil
		if full {
			line = line[:len(line)-1]
		}
		if full || len(line) > 0 {
			w.write(stream, line, full || !errors.Is(err, bufio.ErrBufferFull))
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

// writer appends lines and rotates. It drops what it cannot write, counts it,
// and says so in the log once writing works again.
type writer struct {
	dir      string
	maxBytes int64
	maxFiles int

	mu      sync.Mutex
	f       *os.File
	size    int64
	dropped int64
	retryAt time.Time
	buf     []byte
}

func newWriter(dir string, maxBytes int64, maxFiles int) *writer {
	return &writer{dir: dir, maxBytes: maxBytes, maxFiles: maxFiles}
}

func (w *writer) write(stream string, line []byte, full bool) {
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	if now.Before(w.retryAt) {
		w.dropped++
		return
	}
	w.buf = w.buf[:0]
	if w.dropped > 0 {
		w.buf = appendLine(w.buf, now, "stderr", []byte("[cloudcode: "+strconv.FormatInt(w.dropped, 10)+" lines lost, the log could not be written]"), true)
	}
	w.buf = appendLine(w.buf, now, stream, line, full)
	if err := w.put(); err != nil {
		w.dropped++
		// Not at every line: a full disk stays full for a while.
		w.retryAt = now.Add(time.Second)
		return
	}
	w.dropped = 0
}

func appendLine(b []byte, at time.Time, stream string, line []byte, full bool) []byte {
	b = at.UTC().AppendFormat(b, timeFormat)
	b = append(b, ' ')
	b = append(b, stream...)
	if full {
		b = append(b, " F "...)
	} else {
		b = append(b, " P "...)
	}
	b = append(b, line...)
	return append(b, '\n')
}

// put writes buf whole or leaves the file as it was.
func (w *writer) put() error {
	if w.f == nil {
		if err := w.open(); err != nil {
			return err
		}
	}
	if w.size > 0 && w.size+int64(len(w.buf)) > w.maxBytes {
		if err := w.rotate(); err != nil {
			return err
		}
	}
	n, err := w.f.Write(w.buf)
	if err != nil {
		if n > 0 && w.f.Truncate(w.size) != nil {
			w.size += int64(n)
		}
		return err
	}
	w.size += int64(n)
	return nil
}

func (w *writer) open() error {
	if err := os.MkdirAll(w.dir, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(w.dir, fileName), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	fi, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return err
	}
	w.f, w.size = f, fi.Size()
	return nil
}

func (w *writer) rotate() error {
	_ = w.f.Close()
	w.f = nil
	for i := w.maxFiles - 1; i > 0; i-- {
		if err := os.Rename(rotated(w.dir, i-1), rotated(w.dir, i)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if w.maxFiles <= 1 {
		if err := os.Remove(rotated(w.dir, 0)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return w.open()
}

func (w *writer) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f != nil {
		_ = w.f.Close()
	}
}

// rotated returns the path of the i-th newest file.
func rotated(dir string, i int) string {
	if i == 0 {
		return filepath.Join(dir, fileName)
	}
	return filepath.Join(dir, fileName+"."+strconv.Itoa(i))
}
