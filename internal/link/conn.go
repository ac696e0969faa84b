package link

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// frameSize is the largest piece of data in one message. Larger ones gain
// nothing and cost memory for each idle connection.
const frameSize = 32 << 10

// stream is one direction-agnostic end of a Connect call.
type stream interface {
	// send writes data, or the end of our direction when fin is set.
	send(data []byte, fin bool) error
	// recv returns data, or io.EOF at the end of the peer's direction.
	recv() ([]byte, error)
	// abort ends the call at once, in both directions.
	abort()
	// settle is called once both directions have ended regularly: it ends the
	// call without losing what is still on its way to the peer.
	settle()
	// ended is closed once the call is over in both directions.
	ended() <-chan struct{}
}

// conn is a stream as a net.Conn, with half-close and deadlines.
type conn struct {
	stream stream
	local  net.Addr
	remote net.Addr

	incoming chan []byte // from the reader goroutine; closed after readErr is set
	readErr  error       // why incoming was closed
	rest     []byte      // what Read has not given out yet
	readMu   sync.Mutex  // one Read at a time
	writeMu  sync.Mutex  // one Write or CloseWrite at a time
	finSent  atomic.Bool
	eofRead  atomic.Bool   // Read has given out everything up to the peer's end
	closed   chan struct{} // closed by Close
	once     sync.Once
	done     chan struct{} // closed when the reader goroutine has ended

	readDeadline  *deadline
	writeDeadline *deadline
}

var _ interface {
	net.Conn
	CloseWrite() error
} = (*conn)(nil)

func newConn(s stream, local, remote net.Addr) *conn {
	c := &conn{
		stream: s, local: local, remote: remote,
		incoming: make(chan []byte), closed: make(chan struct{}), done: make(chan struct{}),
		readDeadline: newDeadline(), writeDeadline: newDeadline(),
	}
	go c.readLoop()
	return c
}

// readLoop hands what arrives to Read. gRPC's own flow control holds the peer
// back while nobody reads.
func (c *conn) readLoop() {
	defer close(c.done)
	c.readErr = c.readAll()
	close(c.incoming)
	if errors.Is(c.readErr, io.EOF) {
		// The peer has ended its direction. Wait for the end of the call, which
		// nothing else would notice.
		for err := error(nil); err == nil; {
			_, err = c.stream.recv()
		}
	}
}

func (c *conn) readAll() error {
	for {
		data, err := c.stream.recv()
		if err != nil {
			return err
		}
		select {
		case c.incoming <- data:
		case <-c.closed:
			return net.ErrClosed
		}
	}
}

// Done is closed once the connection is over in both directions: the peer has
// closed it, not only ended its own direction.
func (c *conn) Done() <-chan struct{} { return c.stream.ended() }

func (c *conn) Read(p []byte) (int, error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	for len(c.rest) == 0 {
		expired := c.readDeadline.wait()
		select {
		case <-expired:
			return 0, os.ErrDeadlineExceeded
		default:
		}
		select {
		case data, ok := <-c.incoming:
			if !ok {
				if errors.Is(c.readErr, io.EOF) && !c.eofRead.Swap(true) && c.finSent.Load() {
					c.stream.settle()
				}
				return 0, c.readErr
			}
			c.rest = data
		case <-c.closed:
			return 0, net.ErrClosed
		case <-expired:
			return 0, os.ErrDeadlineExceeded
		}
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *conn) Write(p []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	written := 0
	for len(p) > 0 {
		select {
		case <-c.closed:
			return written, net.ErrClosed
		case <-c.writeDeadline.wait():
			return written, os.ErrDeadlineExceeded
		default:
		}
		if c.finSent.Load() {
			return written, errors.New("link: write after CloseWrite")
		}
		n := min(len(p), frameSize)
		if err := c.sendBounded(p[:n]); err != nil {
			return written, err
		}
		written += n
		p = p[n:]
	}
	return written, nil
}

// sendBounded sends one frame. gRPC's Send blocks under flow control and knows
// no deadline: a deadline that passes meanwhile ends the connection, because a
// frame that is half accepted cannot be taken back.
func (c *conn) sendBounded(data []byte) error {
	if !c.writeDeadline.isSet() {
		return c.stream.send(data, false)
	}
	expired := c.writeDeadline.wait()
	stop := make(chan struct{})
	watched := make(chan bool, 1)
	go func() {
		select {
		case <-expired:
			c.stream.abort()
			watched <- true
		case <-stop:
			watched <- false
		}
	}()
	err := c.stream.send(data, false)
	close(stop)
	if <-watched && err != nil {
		return os.ErrDeadlineExceeded
	}
	return err
}

// CloseWrite ends our direction; the peer may still send.
func (c *conn) CloseWrite() error {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if c.finSent.Swap(true) {
		return nil
	}
	err := c.stream.send(nil, true)
	if c.eofRead.Load() {
		c.stream.settle()
	}
	return err
}

// Close ends both directions. What was written before is still delivered if the
// peer reads it.
func (c *conn) Close() error {
	c.once.Do(func() {
		close(c.closed)
		if !c.finSent.Load() || !c.eofRead.Load() {
			c.stream.abort() // otherwise settle ends it
		}
		<-c.done
	})
	return nil
}

func (c *conn) LocalAddr() net.Addr  { return c.local }
func (c *conn) RemoteAddr() net.Addr { return c.remote }

func (c *conn) SetDeadline(t time.Time) error {
	c.readDeadline.set(t)
	c.writeDeadline.set(t)
	return nil
}
func (c *conn) SetReadDeadline(t time.Time) error  { c.readDeadline.set(t); return nil }
func (c *conn) SetWriteDeadline(t time.Time) error { c.writeDeadline.set(t); return nil }

// deadline is a point in time as a channel that is closed when it has come, as
// in net.Pipe: whoever waits already notices when it is set to the past.
type deadline struct {
	mu      sync.Mutex
	timer   *time.Timer
	expired chan struct{}
}

func newDeadline() *deadline { return &deadline{expired: make(chan struct{})} }

func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.expired
}

// set moves the deadline; the zero time means none.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil && !d.timer.Stop() {
		<-d.expired // the timer has fired: let it finish closing
	}
	d.timer = nil
	if isClosed(d.expired) {
		if !t.IsZero() && !time.Now().Before(t) {
			return // already over
		}
		d.expired = make(chan struct{})
	}
	if t.IsZero() {
		return
	}
	expired := d.expired
	if wait := time.Until(t); wait > 0 {
		d.timer = time.AfterFunc(wait, func() { close(expired) })
	} else {
		close(expired)
	}
}

// isSet reports whether a deadline lies ahead or has passed.
func (d *deadline) isSet() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.timer != nil || isClosed(d.expired)
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// addr is one end of a linked connection.
type addr string

func (a addr) Network() string { return "link" }
func (a addr) String() string  { return string(a) }

// Pipe copies bytes between two connections in both directions, passing on
// half-closes, until both directions have ended, one fails, one is closed as a
// whole, or ctx ends. It closes both.
func Pipe(ctx context.Context, a, b net.Conn) {
	both := func() {
		a.Close()
		b.Close()
	}
	stop := context.AfterFunc(ctx, both)
	defer stop()
	aToB, bToA := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { oneWay(b, a, aToB, bToA, both) })
	wg.Go(func() { oneWay(a, b, bToA, aToB, both) })
	wg.Wait()
	both()
}

// oneWay copies until src has ended its direction, and passes that on. finished
// is closed then, and other when the other direction has come so far.
func oneWay(dst, src net.Conn, finished chan<- struct{}, other <-chan struct{}, both func()) {
	_, err := io.Copy(dst, src)
	close(finished)
	if err != nil {
		both()
		return
	}
	if half, ok := dst.(interface{ CloseWrite() error }); !ok || half.CloseWrite() != nil {
		both()
		return
	}
	// A peer that closes as a whole looks like a half-close first; the other
	// direction may never write again and so never notice.
	if whole, ok := src.(interface{ Done() <-chan struct{} }); ok {
		select {
		case <-whole.Done():
			both()
		case <-other:
		}
	}
}
