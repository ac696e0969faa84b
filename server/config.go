package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/auth"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
)

// Config of a server. DataDir is needed; the zero value of all else works.
type Config struct {
	// DataDir holds what the server keeps: server/ and pki/ below it.
	DataDir string
	// GRPCListen is host:port; empty: 127.0.0.1:7443. Port 0 takes a free one (see
	// Server.Addr).
	GRPCListen string
	// AdvertiseHosts are further names and addresses by which clients reach the
	// server; they are put into its certificate.
	AdvertiseHosts []string

	// Username and Password are what users of the public API show. The password is
	// plain text or a hash (see internal/auth). Without one the API is open, which
	// is refused unless GRPCListen is loopback or AllowAnonymous is set.
	Username, Password string
	AllowAnonymous     bool

	// DefaultImage is for sessions that name no image.
	DefaultImage string

	// StorageProfiles are the object storage that sessions can be kept in. Sessions
	// that name none get the default one; without that they are kept on the disk of a
	// node alone. nil: there are none.
	StorageProfiles *storage.Profiles

	// OwnStorage says what buckets of their own sessions may bring; empty: those at
	// addresses of the public internet.
	OwnStorage storage.OwnPolicy

	// StopTimeout bounds how long Stop waits for calls that run; 0: 5 s.
	StopTimeout time.Duration
	Logger      *slog.Logger
}

func (c *Config) setDefaults() {
	if c.GRPCListen == "" {
		c.GRPCListen = "127.0.0.1:7443"
	}
	if c.StopTimeout <= 0 {
		c.StopTimeout = 5 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

func (c *Config) verifier() (*auth.Verifier, error) {
	if c.DataDir == "" {
		return nil, errors.New("server: DataDir is not set")
	}
	host, _, err := net.SplitHostPort(c.GRPCListen)
	if err != nil {
		return nil, fmt.Errorf("server: GRPCListen %q is no host:port: %w", c.GRPCListen, err)
	}
	if c.Password == "" && !c.AllowAnonymous && !loopback(host) {
		return nil, fmt.Errorf("server: without a password everybody who reaches %s could run code on the nodes: set SERVER_PASSWORD, listen on 127.0.0.1, or say --allow-anonymous", c.GRPCListen)
	}
	return auth.New(c.Username, c.Password)
}

// loopback says whether a listener on host can be reached from this machine
// only. Names but localhost count as not: what they resolve to can change.
func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// certificateHosts are the names and addresses in the server's certificate.
func (c *Config) certificateHosts() []string {
	hosts := []string{"localhost", "127.0.0.1", "::1"}
	if name, err := os.Hostname(); err == nil {
		hosts = append(hosts, name)
	}
	if host, _, err := net.SplitHostPort(c.GRPCListen); err == nil && host != "" {
		if ip := net.ParseIP(host); ip == nil || !ip.IsUnspecified() {
			hosts = append(hosts, host)
		}
	}
	return append(hosts, c.AdvertiseHosts...)
}

// Paths below a data directory.

func pkiDir(dataDir string) string    { return filepath.Join(dataDir, "pki") }
func serverDir(dataDir string) string { return filepath.Join(dataDir, "server") }
func storePath(dataDir string) string { return filepath.Join(serverDir(dataDir), "fleet.db") }

func gatewaysPath(dataDir string) string { return filepath.Join(serverDir(dataDir), "gateways.json") }

// TokenPath is where the server keeps the token that is always accepted as
// `authorization: Bearer …`, for those who can read it.
func TokenPath(dataDir string) string { return filepath.Join(serverDir(dataDir), "token") }

// AddressPath is where the server writes, while it runs, the host:port at which
// this machine reaches it.
func AddressPath(dataDir string) string { return filepath.Join(serverDir(dataDir), "address") }
