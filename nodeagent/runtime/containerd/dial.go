package containerd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	goruntime "runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

// dialTimeout bounds a Dial whose context has no deadline. On loopback the
// kernel answers at once; it does not while a frozen server's queue is full.
const dialTimeout = 10 * time.Second

// Dial implements runtime.Runtime. It asks neither containerd nor the disk: the
// pinned network namespace is all it needs.
func (r *Runtime) Dial(ctx context.Context, session string, port uint16) (net.Conn, error) {
	if !runtime.ValidSession(session) {
		return nil, fmt.Errorf("%w: session %q", runtime.ErrNotFound, session)
	}
	ns, err := os.Open(r.netnsPath(session))
	if err != nil {
		return nil, fmt.Errorf("%w: session %s", runtime.ErrNotFound, session)
	}
	defer ns.Close()
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()

	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		var res result
		res.conn, res.err = dialIn(ctx, int(ns.Fd()), port)
		done <- res
	}()
	// dialIn ends with ctx, so this waits no longer than that.
	res := <-done
	if errors.Is(res.err, errNotNetns) {
		return nil, fmt.Errorf("%w: session %s", runtime.ErrNotFound, session)
	}
	if res.err != nil {
		return nil, fmt.Errorf("session %s port %d: %w", session, port, res.err)
	}
	return res.conn, nil
}

var errNotNetns = errors.New("not a network namespace")

// dialIn must run in a goroutine of its own: when the thread cannot go back to
// where it was, it stays locked and so ends with the goroutine.
func dialIn(ctx context.Context, ns int, port uint16) (net.Conn, error) {
	goruntime.LockOSThread()
	host, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		goruntime.UnlockOSThread()
		return nil, err
	}
	defer unix.Close(host)
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		goruntime.UnlockOSThread()
		return nil, fmt.Errorf("%w: %w", errNotNetns, err)
	}
	var d net.Dialer
	p := strconv.Itoa(int(port))
	// One literal address: the dialer makes its socket in this very goroutine.
	conn, err := d.DialContext(ctx, "tcp4", net.JoinHostPort("127.0.0.1", p))
	if errors.Is(err, unix.ECONNREFUSED) {
		if c6, err6 := d.DialContext(ctx, "tcp6", net.JoinHostPort("::1", p)); err6 == nil {
			conn, err = c6, nil
		}
	}
	if unix.Setns(host, unix.CLONE_NEWNET) == nil {
		goruntime.UnlockOSThread()
	}
	return conn, err
}
