package link_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/cloudcode-dev/cloudcode/internal/link"
	linkv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/link/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is a hub and a node linked to it, over real gRPC.
type pair struct {
	hub    *link.Hub
	server *grpc.Server
	cancel context.CancelFunc
	kept   sync.WaitGroup
}

func newPair(t *testing.T, dial link.Dialer) *pair {
	t.Helper()
	p := &pair{hub: link.NewHub(func(context.Context) (string, error) { return "n1", nil }, slog.New(slog.DiscardHandler))}
	listener := bufconn.Listen(1 << 20)
	p.server = grpc.NewServer()
	linkv1.RegisterLinkServiceServer(p.server, p.hub)
	p.kept.Go(func() { p.server.Serve(listener) })
	conn, err := grpc.NewClient("passthrough:///hub",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	up := make(chan struct{})
	var once sync.Once
	p.kept.Go(func() {
		link.Keep(ctx, conn, dial, slog.New(slog.DiscardHandler), func(linked bool) {
			if linked {
				once.Do(func() { close(up) })
			}
		})
	})
	t.Cleanup(func() {
		p.cancel()
		p.hub.Close()
		p.server.Stop()
		p.kept.Wait()
		conn.Close()
	})
	select {
	case <-up:
	case <-time.After(5 * time.Second):
		t.Fatal("the node did not link within 5 s")
	}
	return p
}

// toTCP dials the same address whatever the target.
func toTCP(address string) link.Dialer {
	return func(ctx context.Context, _ *linkv1.Target) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", address)
	}
}

func (p *pair) dial(t *testing.T) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c, err := p.hub.Dial(ctx, "n1", &linkv1.Target{Kind: &linkv1.Target_Session{Session: &linkv1.SessionTarget{SessionId: "s"}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// tcpServer serves each connection with handle and waits for all at the end.
func tcpServer(t *testing.T, handle func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { defer c.Close(); handle(c.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

func TestBytesAndHalfClose(t *testing.T) {
	// Answers only once the client's direction has ended: without half-close
	// this would wait for ever.
	address := tcpServer(t, func(c *net.TCPConn) {
		all, _ := io.ReadAll(c)
		c.Write(all)
	})
	c := newPair(t, toTCP(address)).dial(t)
	want := make([]byte, 3<<20)
	rand.Read(want)
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if n, err := c.Write(want); err != nil || n != len(want) {
		t.Fatalf("Write = %d, %v", n, err)
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read %d of %d bytes, err %v", len(got), len(want), err)
	}
}

func TestWholeCloseReachesTarget(t *testing.T) {
	ended := make(chan error, 1)
	address := tcpServer(t, func(c *net.TCPConn) {
		// Like an event stream: never writes, and does not care for a half-close.
		io.Copy(io.Discard, c)
		for {
			if _, err := c.Write([]byte("x")); err != nil {
				ended <- err
				return
			}
		}
	})
	c := newPair(t, toTCP(address)).dial(t)
	c.Close()
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Fatal("the target's connection is still open 5 s after Close")
	}
}

func TestDeadlines(t *testing.T) {
	address := tcpServer(t, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	c := newPair(t, toTCP(address)).dial(t)
	c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read = %v, want a deadline error", err)
	}
	// A Read that waits already notices a deadline that is set to the past, which
	// is how net/http takes a connection over.
	c.SetReadDeadline(time.Time{})
	result := make(chan error, 1)
	go func() { _, err := c.Read(make([]byte, 1)); result <- err }()
	c.SetReadDeadline(time.Unix(1, 0))
	if err := <-result; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read = %v, want a deadline error", err)
	}
	var timeout net.Error
	c.SetWriteDeadline(time.Unix(1, 0))
	if _, err := c.Write([]byte("x")); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("Write = %v, want a timeout", err)
	}
	c.SetWriteDeadline(time.Time{})
	if _, err := c.Write([]byte("x")); err != nil {
		t.Errorf("Write after the deadline was taken back = %v", err)
	}
}

func TestWriteDeadlineUnderBackPressure(t *testing.T) {
	hold := make(chan struct{})
	address := tcpServer(t, func(*net.TCPConn) { <-hold })
	c := newPair(t, toTCP(address)).dial(t)
	defer close(hold)
	c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	if _, err := c.Write(make([]byte, 64<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("Write = %v, want a deadline error", err)
	}
}

func TestStalledConnectionsDoNotSlowOthers(t *testing.T) {
	hold := make(chan struct{})
	address := tcpServer(t, func(c *net.TCPConn) {
		first := make([]byte, 1)
		io.ReadFull(c, first)
		if first[0] == 's' {
			<-hold // never reads again
			return
		}
		io.Copy(c, c)
	})
	p := newPair(t, toTCP(address))
	var stalled sync.WaitGroup
	for range 20 {
		c := p.dial(t)
		stalled.Go(func() { c.Write([]byte("s")); c.Write(make([]byte, 1<<20)) })
		t.Cleanup(func() { c.Close() })
	}
	c := p.dial(t)
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write([]byte("e")); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if _, err := c.Write([]byte("ping")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
	}
	p.cancel()
	close(hold)
	stalled.Wait()
}

func TestHTTPOverLink(t *testing.T) {
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(w, r.Body)
	}))
	defer upstream.Close()
	p := newPair(t, toTCP(upstream.Listener.Addr().String()))
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return p.hub.Dial(ctx, "n1", &linkv1.Target{})
	}}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	for range 3 {
		resp, err := client.Post("http://session/", "text/plain", strings.NewReader("hello"))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(body) != "hello" {
			t.Fatalf("body %q, %v", body, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	p := newPair(t, func(context.Context, *linkv1.Target) (net.Conn, error) {
		return nil, status.Error(codes.FailedPrecondition, "generation 3 is over")
	})
	_, err := p.hub.Dial(t.Context(), "n1", &linkv1.Target{})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "generation 3") {
		t.Errorf("Dial = %v, want the node's own error", err)
	}
	if _, err := p.hub.Dial(t.Context(), "n2", &linkv1.Target{}); !errors.Is(err, link.ErrNoLink) {
		t.Errorf("Dial of an unknown node = %v, want ErrNoLink", err)
	}
}

func TestDialThatNobodyWaitsFor(t *testing.T) {
	asked, release, closed := make(chan struct{}), make(chan struct{}), make(chan struct{})
	p := newPair(t, func(context.Context, *linkv1.Target) (net.Conn, error) {
		close(asked)
		<-release
		ours, theirs := net.Pipe()
		go func() {
			defer close(closed)
			io.Copy(io.Discard, theirs)
		}()
		return ours, nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() { _, err := p.hub.Dial(ctx, "n1", &linkv1.Target{}); failed <- err }()
	<-asked
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Fatalf("Dial = %v", err)
	}
	close(release)
	select {
	case <-closed: // the node let go of the target
	case <-time.After(5 * time.Second):
		t.Fatal("the target is still open after 5 s")
	}
}

func TestLinkComesBack(t *testing.T) {
	address := tcpServer(t, func(c *net.TCPConn) { io.Copy(c, c) })
	hub := link.NewHub(func(context.Context) (string, error) { return "n1", nil }, slog.New(slog.DiscardHandler))
	var mu sync.Mutex
	listener := bufconn.Listen(1 << 20)
	start := func(l *bufconn.Listener) *grpc.Server {
		s := grpc.NewServer()
		linkv1.RegisterLinkServiceServer(s, hub)
		go s.Serve(l)
		return s
	}
	server := start(listener)
	conn, err := grpc.NewClient("passthrough:///hub",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			mu.Lock()
			l := listener
			mu.Unlock()
			return l.DialContext(ctx)
		}), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(t.Context())
	up := make(chan bool, 16)
	var kept sync.WaitGroup
	kept.Go(func() {
		link.Keep(ctx, conn, toTCP(address), slog.New(slog.DiscardHandler), func(linked bool) { up <- linked })
	})
	defer kept.Wait()
	defer cancel()
	expect := func(want bool) {
		t.Helper()
		select {
		case got := <-up:
			if got != want {
				t.Fatalf("linked = %v, want %v", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("no change to linked = %v within 10 s", want)
		}
	}
	expect(true)
	c, err := hub.Dial(ctx, "n1", &linkv1.Target{})
	if err != nil {
		t.Fatal(err)
	}
	server.Stop()
	expect(false)
	if _, err := io.ReadAll(c); err == nil {
		t.Error("a connection whose hub was stopped ended like a regular one")
	}
	c.Close()
	mu.Lock()
	listener = bufconn.Listen(1 << 20)
	mu.Unlock()
	server = start(listener)
	defer server.Stop()
	expect(true)
	c, err = hub.Dial(ctx, "n1", &linkv1.Target{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("again"))
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
}
