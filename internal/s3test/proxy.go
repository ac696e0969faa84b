package s3test

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/storage"
)

// Proxy passes TCP connections on to a server, with a delay each way, and breaks
// when it is told to.
type Proxy struct {
	target string
	l      net.Listener
	wg     sync.WaitGroup

	delay atomic.Int64
	sent  atomic.Int64 // towards the server
	recv  atomic.Int64
	conns atomic.Int64

	mu   sync.Mutex
	mode mode
	// changed is closed, and made anew, at every change of mode.
	changed chan struct{}
	open    map[net.Conn]struct{}
	closed  bool
}

type mode int

const (
	passing   mode = iota
	blackhole      // bytes are kept back
	cut            // connections are reset
)

// Proxy starts a proxy in front of the server, with a delay each way. It ends with the test.
func (s *Server) Proxy(delay time.Duration) *Proxy {
	s.t.Helper()
	return NewProxy(s.t, s.Addr(), delay)
}

// NewProxy starts a proxy in front of any TCP address.
func NewProxy(t testing.TB, target string, delay time.Duration) *Proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{target: target, l: l, changed: make(chan struct{}), open: map[net.Conn]struct{}{}}
	p.SetDelay(delay)
	p.wg.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

// Endpoint is the URL of the server behind the proxy.
func (p *Proxy) Endpoint() string { return "http://" + p.l.Addr().String() }

// Config is a Config of the server, by way of the proxy.
func (p *Proxy) Config(c storage.Config) storage.Config {
	c.Endpoint = p.Endpoint()
	return c
}

// SetDelay of bytes that come from now on.
func (p *Proxy) SetDelay(d time.Duration) { p.delay.Store(int64(d)) }

// Blackhole keeps all bytes back: connections hang, new ones too.
func (p *Proxy) Blackhole() { p.set(blackhole) }

// Cut resets all connections, and new ones as they come.
func (p *Proxy) Cut() {
	p.set(cut)
	p.Reset()
}

// Resume ends Blackhole and Cut. What a black hole held back goes on.
func (p *Proxy) Resume() { p.set(passing) }

// Reset breaks the connections there are; new ones pass.
func (p *Proxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.open {
		reset(c)
	}
}

// Bytes that went towards the server, and back.
func (p *Proxy) Bytes() (sent, received int64) { return p.sent.Load(), p.recv.Load() }

// Connections that were made.
func (p *Proxy) Connections() int64 { return p.conns.Load() }

func reset(c net.Conn) {
	if tc, ok := c.(*net.TCPConn); ok {
		_ = tc.SetLinger(0) // RST, as from a machine that died
	}
	c.Close()
}

func (p *Proxy) set(m mode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mode = m
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *Proxy) state() (m mode, changed <-chan struct{}, closed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mode, p.changed, p.closed
}

func (p *Proxy) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.l.Close()
	p.set(cut)
	p.Reset()
	p.wg.Wait()
}

// track remembers a connection; it refuses once the proxy is closed.
func (p *Proxy) track(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.mode == cut {
		return false
	}
	p.open[c] = struct{}{}
	return true
}

func (p *Proxy) forget(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.open, c)
	c.Close()
}

func (p *Proxy) accept() {
	for {
		c, err := p.l.Accept()
		if err != nil {
			return
		}
		p.conns.Add(1)
		if !p.track(c) {
			reset(c)
			continue
		}
		p.wg.Go(func() { p.serve(c) })
	}
}

func (p *Proxy) serve(client net.Conn) {
	defer p.forget(client)
	server, err := net.DialTimeout("tcp", p.target, 5*time.Second)
	if err != nil {
		reset(client)
		return
	}
	if !p.track(server) {
		reset(server)
		return
	}
	defer p.forget(server)
	var wg sync.WaitGroup
	wg.Go(func() { p.pipe(server, client, &p.sent) })
	wg.Go(func() { p.pipe(client, server, &p.recv) })
	wg.Wait()
}

type chunk struct {
	data []byte
	due  time.Time
	err  error
}

// pipe reads ahead, so that a delay does not limit how much is under way.
func (p *Proxy) pipe(dst, src net.Conn, count *atomic.Int64) {
	chunks := make(chan chunk, 1024)
	p.wg.Go(func() {
		defer close(chunks)
		for {
			buf := make([]byte, 32<<10)
			n, err := src.Read(buf)
			chunks <- chunk{buf[:n], time.Now().Add(time.Duration(p.delay.Load())), err}
			if err != nil {
				return
			}
		}
	})
	broken := false
	for c := range chunks { // to its end, as the reader waits for that
		if broken {
			continue
		}
		if broken = !p.wait(c.due); broken {
			reset(dst)
			reset(src)
			continue
		}
		if len(c.data) > 0 {
			if _, err := dst.Write(c.data); err != nil {
				broken = true
				reset(src)
				continue
			}
			count.Add(int64(len(c.data)))
		}
		switch {
		case errors.Is(c.err, io.EOF):
			if tc, ok := dst.(*net.TCPConn); ok {
				_ = tc.CloseWrite()
			}
		case c.err != nil:
			reset(dst)
		}
	}
}

// wait returns true when a chunk may pass.
func (p *Proxy) wait(due time.Time) bool {
	if d := time.Until(due); d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		_, changed, _ := p.state()
		select {
		case <-t.C:
		case <-changed: // a cut is not delayed; a chunk that passes early harms nothing
		}
	}
	for {
		m, changed, closed := p.state()
		switch {
		case closed || m == cut:
			return false
		case m == passing:
			return true
		}
		<-changed
	}
}
