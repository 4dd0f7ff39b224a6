"""See: spectra and effective ranks of weights and embeddings, and the X-ray of a model."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.core.plan import RankPlan as RankPlan
    from fullrank.spectra.activations import ActivationMeter as ActivationMeter
    from fullrank.spectra.activations import activation_spectra as activation_spectra
    from fullrank.spectra.callback import RankMeCallback as RankMeCallback
    from fullrank.spectra.dynamics import RankDynamics as RankDynamics
    from fullrank.spectra.dynamics import rank_dynamics as rank_dynamics
    from fullrank.spectra.feature_rank import feature_rank as feature_rank
    from fullrank.spectra.gradient_cosines import GradientCosines as GradientCosines
    from fullrank.spectra.gradient_cosines import gradient_cosines as gradient_cosines
    from fullrank.spectra.gradient_quality import GradientQuality as GradientQuality
    from fullrank.spectra.gradient_spectrum import gradient_spectrum as gradient_spectrum
    from fullrank.spectra.heavy_tail import TailFit as TailFit
    from fullrank.spectra.heavy_tail import heavy_tail_alpha as heavy_tail_alpha
    from fullrank.spectra.lidar import lidar as lidar
    from fullrank.spectra.matrix_spectrum import MatrixSpectrum as MatrixSpectrum
    from fullrank.spectra.measures import effective_rank as effective_rank
    from fullrank.spectra.measures import energy_rank as energy_rank
    from fullrank.spectra.measures import nuclear_norm as nuclear_norm
    from fullrank.spectra.measures import participation_ratio as participation_ratio
    from fullrank.spectra.measures import stable_rank as stable_rank
    from fullrank.spectra.meter import SpectrumMeter as SpectrumMeter
    from fullrank.spectra.rankme import RankMeMeter as RankMeMeter
    from fullrank.spectra.rankme import rankme as rankme
    from fullrank.spectra.rankme import select_by_rankme as select_by_rankme
    from fullrank.spectra.report import ModelReport as ModelReport
    from fullrank.spectra.report import model_report as model_report
    from fullrank.spectra.run_log import RunLog as RunLog
    from fullrank.spectra.run_log import read_run as read_run
    from fullrank.spectra.run_log_callback import RunLogCallback as RunLogCallback
    from fullrank.spectra.spectrum import Spectrum as Spectrum
    from fullrank.spectra.xray import XRay as XRay
    from fullrank.spectra.xray import xray as xray

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(
            [
                "effective_rank",
                "energy_rank",
                "nuclear_norm",
                "participation_ratio",
                "stable_rank",
            ],
            "measures",
        ),
        **dict.fromkeys(["ActivationMeter", "activation_spectra"], "activations"),
        "SpectrumMeter": "meter",
        **dict.fromkeys(["RankMeMeter", "rankme", "select_by_rankme"], "rankme"),
        **dict.fromkeys(["XRay", "xray"], "xray"),
        **dict.fromkeys(["RunLog", "read_run"], "run_log"),
        "RunLogCallback": "run_log_callback",
        **dict.fromkeys(["ModelReport", "model_report"], "report"),
        **dict.fromkeys(["RankDynamics", "rank_dynamics"], "dynamics"),
        "feature_rank": "feature_rank",
        "MatrixSpectrum": "matrix_spectrum",
        **dict.fromkeys(["TailFit", "heavy_tail_alpha"], "heavy_tail"),
        "lidar": "lidar",
        **dict.fromkeys(["GradientCosines", "gradient_cosines"], "gradient_cosines"),
        "GradientQuality": "gradient_quality",
        "gradient_spectrum": "gradient_spectrum",
        "RankMeCallback": "callback",
        "RankPlan": "plan",
        "Spectrum": "spectrum",
    },
)
